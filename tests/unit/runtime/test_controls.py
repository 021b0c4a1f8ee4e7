"""Logit controls through the whole engine: transformers' generate() decides what is right."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distllm import LLM, RequestError, SamplingParams
from distllm.comm.local import LocalControl, run_ranks
from tests.checkpoints import make_llama

NUM_TOKENS = 12
CONTROLS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"logit_bias": {7: 3.0, 90: -5.0, 33: 2.5}},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "logit_bias": {5: 4.0}},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, make_llama(folder, num_hidden_layers=2)


def prompts(count: int) -> list[list[int]]:
    """Of few different tokens, so that what was there before comes again."""
    rng = random.Random(3)
    return [[rng.randrange(3, 12) for _ in range(rng.randrange(3, 30))] for _ in range(count)]


def reference(model: Any, prompt: list[int], controls: dict[str, Any]) -> list[int]:
    options = dict(controls)
    if "logit_bias" in options:
        options["sequence_bias"] = [[[token], value] for token, value in options.pop("logit_bias").items()]
    out = model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        pad_token_id=0,
        eos_token_id=None,
        **options,
    )
    return out[0, len(prompt) :].tolist()


def generate(folder: Path, tp: int, pp: int, prompts: Any, params: Any, **options: Any) -> list[list[int]]:
    def run(control: LocalControl) -> list[list[int]]:
        with LLM(
            str(folder), tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=control, **options
        ) as llm:
            return [out.outputs[0].token_ids for out in llm.generate(prompts, params)]

    return run_ranks(tp * pp, run, timeout_s=120)[0]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (1, 2)])
def test_greedy_tokens_are_those_of_transformers(model: tuple[Path, Any], tp: int, pp: int) -> None:
    folder, oracle = model
    texts = prompts(10)
    chosen = [CONTROLS[i % len(CONTROLS)] for i in range(len(texts))]
    params = [SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, **c) for c in chosen]
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 4}
    found = generate(folder, tp, pp, texts, params, **options)
    assert found == [reference(oracle, *pair) for pair in zip(texts, chosen, strict=True)]


def test_controls_forbid_and_allow(model: tuple[Path, Any]) -> None:
    """What greedy decoding would take first is forbidden; what it would never take is all that is allowed."""
    folder, _ = model
    text, base = prompts(1)[0], {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    (plain,) = generate(folder, 1, 1, [text], SamplingParams(**base))
    rare = [token for token in range(40, 50) if token not in plain]
    ways = [{"allowed_token_ids": rare}, {"logit_bias": {rare[0]: 100}}, {"presence_penalty": 2.0}]
    found = generate(folder, 1, 2, [text] * 3, [SamplingParams(**base, **way) for way in ways])
    assert set(found[0]) <= set(rare) and set(found[1]) == {rare[0]}
    assert found[2][0] == plain[0]  # nothing is generated yet


def test_a_controlled_row_does_not_see_its_batch_or_layout(model: tuple[Path, Any]) -> None:
    folder, _ = model
    texts = prompts(6)
    params = [
        SamplingParams(
            max_tokens=NUM_TOKENS, ignore_eos=True, seed=i, temperature=1.5, typical_p=0.8, top_k=40,
            presence_penalty=0.5, frequency_penalty=0.7, repetition_penalty=1.2,
        )
        for i in range(6)
    ]  # fmt: skip
    alone = [generate(folder, 1, 1, [text], own)[0] for text, own in zip(texts, params, strict=True)]
    for tp, pp in [(1, 1), (2, 2)]:
        assert generate(folder, tp, pp, texts, params, max_num_seqs=4) == alone


def test_processors_by_name(model: tuple[Path, Any]) -> None:
    folder, _ = model

    def only_longer(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor(len(token_ids)), 0.0)

    def run(control: LocalControl) -> Any:
        processors = {"other": lambda ids, logits: logits / 0, "length": only_longer}
        with LLM(str(folder), pipeline_parallel_size=2, comm=control, logits_processors=processors) as llm:
            with pytest.raises(RequestError, match="holds 'mine'; the LLM was given: other, length"):
                llm.generate([[5]], SamplingParams(logits_processors=["mine"]))
            return llm.generate([[5] * 9, [6]], SamplingParams(logits_processors=["length"], max_tokens=3))

    outputs = run_ranks(2, run, timeout_s=60)[0]
    assert [out.outputs[0].token_ids for out in outputs] == [[9, 10, 11], [1, 2]]  # 2 is eos


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_processor_that_fails_ends_its_request_alone(
    model: tuple[Path, Any], layout: tuple[int, int]
) -> None:
    """What it had said until then is given out; the others say what they would have said without it."""

    def seventh(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(token_ids) == 7:
            raise LookupError("there is\nno seventh")
        return logits

    processors = {"seventh": seventh, "short": lambda ids, logits: logits[1:], "fine": lambda ids, x: -x}
    named: list[list[str] | None] = [None, ["fine", "seventh"], ["short"], ["fine"], ["seventh"]]
    nine = SamplingParams(max_tokens=9, ignore_eos=True, temperature=0)
    asked = [replace(nine, logits_processors=names) for names in named]
    fine = [0, 3, 4]
    texts: list[list[int]] = [[5, 6], [7] * 5, [8], [9] * 30, [4] * 12]

    def run(control: LocalControl) -> Any:
        grid = {"tensor_parallel_size": layout[0], "pipeline_parallel_size": layout[1]}
        with LLM(str(model[0]), **grid, comm=control, logits_processors=processors) as llm:
            both = [
                llm.generate([texts[i] for i in ids], [asked[i] for i in ids]) for ids in (range(5), fine)
            ]
            last = {out.request_id: out for out in llm.stream(texts[1:3], asked[1:3])}
            return both, last

    (together, alone), streamed = run_ranks(layout[0] * layout[1], run, timeout_s=60)[0]
    found = [out.outputs[0] for out in together]
    assert [len(each.token_ids) for each in found] == [9, 2, 0, 9, 9]
    assert [each.finish_reason for each in found] == ["length", "error", "error", "length", "length"]
    why = r"logits processor 'seventh' raised LookupError in test_controls.py, line \d+: there is no seventh$"
    assert re.match(why, found[1].stop_reason)
    assert "'short' returned [130] of torch.float32; it must return [131] of" in found[2].stop_reason
    assert [found[i].token_ids for i in fine] == [out.outputs[0].token_ids for out in alone]
    assert [out.outputs[0].finish_reason for out in streamed.values()] == ["error", "error"]


def test_an_error_behind_a_wrong_guess_does_not_count(model: tuple[Path, Any]) -> None:
    """A processor meets texts that nobody has said where guesses are verified."""
    said: list[list[int]] = []
    unsaid = []

    def strict(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if said and not any(text[: len(token_ids)] == token_ids for text in said):
            unsaid.append(token_ids)
            raise LookupError("nobody has said this")
        return logits

    asked = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0, logits_processors=["strict"])
    guessing = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}
    for config in (None, guessing):
        with LLM(str(model[0]), logits_processors={"strict": strict}, speculative_config=config) as llm:
            outputs = llm.generate(prompts(6), asked)
        texts = [[*out.prompt_token_ids, *out.outputs[0].token_ids] for out in outputs]
        assert texts == (said or texts)
        said = texts
    assert unsaid
