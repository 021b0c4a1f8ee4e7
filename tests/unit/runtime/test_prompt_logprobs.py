"""Log-probabilities of prompts against transformers: in chunks, by stages, in any batch; and what evaluation
harnesses make of them, who send a context and its continuation as one prompt.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distllm import LLM, RequestOutput, SamplingParams
from distllm.comm.local import LocalControl, run_ranks
from distllm.runtime.sampling import sampler
from tests.checkpoints import greedy_reference, make_llama

SCHEDULES: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"max_num_batched_tokens": 7, "block_size": 4},
    "few rows, little memory": {"max_num_seqs": 3, "block_size": 4, "max_model_len": 64},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, make_llama(folder, num_hidden_layers=2)


def run(folder: Path, tp: int, pp: int, method: str, *args: Any, **options: Any) -> Any:
    def call(control: LocalControl) -> Any:
        with LLM(
            str(folder), tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=control, **options
        ) as llm:
            return getattr(llm, method)(*args)

    return run_ranks(tp * pp, call, timeout_s=120)[0]


def prompts() -> list[list[int]]:
    rng = random.Random(5)
    shared = [rng.randrange(3, 131) for _ in range(16)]
    own = [[rng.randrange(3, 131) for _ in range(rng.randrange(1, 30))] for _ in range(9)]
    return [shared[: 8 * (i % 3)] + text for i, text in enumerate(own)]


@torch.no_grad()
def reference(model: Any, prompt: list[int]) -> torch.Tensor:
    return model(torch.tensor([prompt])).logits[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_they_are_those_of_transformers(
    model: tuple[Path, Any], tp: int, pp: int, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "SCORED_ROWS", 5)
    (folder, oracle), texts = model, prompts()
    asked = [None, 0, 3, 5, None, 2, 0, 1, 4]
    params = [
        SamplingParams(
            temperature=0, max_tokens=9, ignore_eos=True, prompt_logprobs=k, logprobs=2, n=1 + i % 2
        )
        for i, k in enumerate(asked)
    ]
    options = dict(SCHEDULES[schedule])
    if "few" in schedule:
        options["kv_cache_memory_bytes"] = 64 * 2 * 2 * 2 * 8 * 4 // pp // tp  # one sequence of 64
    outputs = run(folder, tp, pp, "generate", texts, params, **options)
    for text, k, output in zip(texts, asked, outputs, strict=True):
        if k is None:
            assert output.prompt_logprobs is None
            continue
        assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(text)
        expected = reference(oracle, text)
        for token_id, entries, row in zip(text[1:], output.prompt_logprobs[1:], expected, strict=True):
            best = row.topk(k).indices.tolist()
            assert set(entries) == {token_id, *best}
            for number, entry in entries.items():
                assert entry.logprob == pytest.approx(row[number].item(), abs=1e-4)
                assert entry.rank == 1 + int((row > row[number]).sum())


Question = tuple[list[int], list[int]]  # context, continuation
Answer = tuple[list[float], bool]  # log-probability of each token of the continuation; is it the greedy one


def questions(oracle: Any) -> list[Question]:
    """As of a multiple choice: continuations of the same contexts, the greedy one among them."""
    rng = random.Random(7)
    found: list[Question] = []
    for context_len in (1, 2, 9, 30):
        context = rng.choices(range(3, 131), k=context_len)
        greedy = greedy_reference(oracle, context, 4)
        others = [rng.choices(range(3, 131), k=length) for length in (1, 12)]
        found += [(context, continuation) for continuation in (greedy, [*greedy[:3], 3], *others)]
    return found


def answer(oracle: Any, context: list[int], continuation: list[int]) -> Answer:
    rows, tokens = reference(oracle, context + continuation)[len(context) - 1 :], torch.tensor(continuation)
    logprobs = rows.gather(1, tokens[:, None])[:, 0].tolist()
    return logprobs, bool((rows.argmax(-1) == tokens).all())


def read_echo(output: RequestOutput, context_len: int) -> Answer:
    """As lm-eval's local-completions reads a completion that echoes its prompt: token_logprobs and
    top_logprobs behind the context, but for the last, of the token that had to be generated; greedy is what
    has the best log-probability of each position.
    """
    completion = output.outputs[0]
    assert output.prompt_logprobs is not None and completion.logprobs is not None
    token_ids = [*output.prompt_token_ids, *completion.token_ids]
    positions = list(zip(token_ids, [*output.prompt_logprobs, *completion.logprobs], strict=True))
    found, greedy = [], True
    for token_id, entries in positions[context_len:-1]:
        assert entries is not None
        found.append(entries[token_id].logprob)
        greedy &= found[-1] == max(entry.logprob for entry in entries.values())
    return found, greedy


def check_answers(found: list[Answer], oracle: Any, asked: list[Question]) -> None:
    expected = [answer(oracle, *question) for question in asked]
    assert {greedy for _, greedy in expected} == {True, False}
    for (logprobs, greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
        assert greedy == wanted_greedy
        assert logprobs == pytest.approx(wanted, abs=1e-4)
        assert sum(logprobs) == pytest.approx(sum(wanted), abs=1e-3)


@pytest.mark.parametrize("schedule", ["whole", "chunks"])
def test_what_an_evaluation_harness_reads_off_an_echo(model: tuple[Path, Any], schedule: str) -> None:
    (folder, oracle), asked = model, questions(model[1])
    texts = [context + continuation for context, continuation in asked]
    echo = SamplingParams(temperature=0, max_tokens=1, logprobs=1, prompt_logprobs=1)
    # The generated token counts even where it ends the text, as it does for every other one.
    stops = [greedy_reference(oracle, text, 1) if i % 2 else None for i, text in enumerate(texts)]
    params = [replace(echo, stop_token_ids=stop) for stop in stops]
    outputs = run(folder, 1, 2, "generate", texts, params, **SCHEDULES[schedule])
    assert {output.outputs[0].finish_reason for output in outputs[1::2]} == {"stop"}
    contexts = [len(context) for context, _ in asked]
    check_answers([read_echo(*each) for each in zip(outputs, contexts, strict=True)], oracle, asked)


@pytest.mark.parametrize("schedule", ["whole", "chunks"])
def test_scores(model: tuple[Path, Any], schedule: str) -> None:
    """The same from score(), where entry i is of token i + 1."""
    (folder, oracle), asked = model, questions(model[1])
    texts = [context + continuation for context, continuation in asked]
    scores = run(folder, 1, 2, "score", texts, **SCHEDULES[schedule])
    found = []
    for text, (context, _), score in zip(texts, asked, scores, strict=True):
        assert score.prompt_token_ids == text and len(score.logprobs) == len(text) - 1
        assert score.logprob == pytest.approx(sum(answer(oracle, text[:1], text[1:])[0]), abs=1e-3)
        start = len(context) - 1
        found.append((score.logprobs[start:], all(score.is_greedy[start:])))
    check_answers(found, oracle, asked)


def test_a_cached_prefix_is_computed_again(model: tuple[Path, Any]) -> None:
    """Or its scores would be missing."""
    folder, _ = model
    with LLM(str(folder), block_size=4) as llm:
        text = list(range(3, 40))
        plain = llm.generate(text, SamplingParams(max_tokens=1))
        scored = llm.generate(text, SamplingParams(max_tokens=1, prompt_logprobs=0))
        again = llm.generate(text, SamplingParams(max_tokens=1))
    assert (plain[0].num_cached_tokens, scored[0].num_cached_tokens) == (0, 0)
    assert again[0].num_cached_tokens == 36 and None not in scored[0].prompt_logprobs[1:]
