"""Structured outputs through the whole engine: jsonschema and re decide whether a text has its form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distllm import LLM, RequestError, SamplingParams, StructuredOutputsParams
from distllm.comm.local import LocalControl, run_ranks
from distllm.runtime.scheduler import Scheduler
from tests.structured_cases import cases, check_text, make_folder

MAX_TOKENS = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("structured"))


def with_llm(folder: Path, layout: tuple[int, int], use: Callable[[LLM], Any], **options: Any) -> Any:
    """What use(llm) returns on rank 0."""
    grid = {"tensor_parallel_size": layout[0], "pipeline_parallel_size": layout[1]}
    options = {"kv_cache_memory_bytes": 2**25} | options

    def run(control: LocalControl) -> Any:
        with LLM(str(folder), comm=control, **grid, **options) as llm:
            return use(llm)

    return run_ranks(layout[0] * layout[1], run, timeout_s=110)[0]


def params(form: StructuredOutputsParams, seed: int, **others: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=form, seed=seed, **({"max_tokens": MAX_TOKENS} | others))


def check_outputs(folder: Path, layout: tuple[int, int], count: int, **options: Any) -> list[list[int]]:
    """Every other prompt is a plain one, so that both kinds run in one batch. Gives all tokens."""
    forms = list(cases(count))
    asked = []
    for seed, form in enumerate(forms):
        asked += [params(form, seed), SamplingParams(max_tokens=1 + seed % 30, seed=seed, ignore_eos=True)]
    prompts = [[5 + i % 90] * (1 + i % 7) for i in range(len(asked))]
    outputs = with_llm(folder, layout, lambda llm: llm.generate(prompts, asked), **options)
    for form, output in zip(forms, outputs[::2], strict=True):
        completion = output.outputs[0]
        assert completion.finish_reason == "stop", (form, completion)
        assert completion.token_ids[-1] == 2
        check_text(form, completion.text)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_texts_have_their_form_in_every_layout(folder: Path) -> None:
    """And the same tokens, which the plain ones have without any structured row beside them too."""
    alone = check_outputs(folder, (1, 1), 14, max_num_seqs=2)
    for layout in [(2, 1), (1, 2), (2, 2)]:
        assert check_outputs(folder, layout, 14, max_num_seqs=24, max_num_batched_tokens=40) == alone


@pytest.mark.slow
def test_300_schemas_and_regexes(folder: Path) -> None:
    check_outputs(folder, (1, 1), 300, max_num_seqs=64)


def test_preemption_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preempted, preempt = [], Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda self, r: (preempted.append(r), preempt(self, r)))
    form = StructuredOutputsParams(json={"type": "array", "items": {"enum": [1, 23, "é"]}, "minItems": 25})
    asked = [params(form, seed, max_tokens=90, n=1 + seed % 2) for seed in range(10)]
    block_bytes = 2 * 1 * 4 * 2 * 8 * 4  # K and V · layers of a stage · tokens · KV heads · head_dim · fp32
    tight = {"block_size": 4, "kv_cache_memory_bytes": 60 * block_bytes, "max_model_len": 128}

    def use(llm: LLM) -> list[list[int]]:
        outputs = llm.generate([[7, 8, 9]] * len(asked), asked)
        assert all(sample.finish_reason in ("stop", "length") for out in outputs for sample in out.outputs)
        return [list(sample.token_ids) for out in outputs for sample in out.outputs]

    plain = with_llm(folder, (1, 1), use)
    assert not preempted
    assert with_llm(folder, (1, 2), use, **tight) == plain
    assert len(preempted) > 5


def test_each_of_n_samples_has_the_form(folder: Path) -> None:
    form = StructuredOutputsParams(choice=["yes", "no", "maybe", "y", 'é "quoted"\n'])
    found = with_llm(folder, (1, 2), lambda llm: llm.generate([[7, 8]], params(form, 3, n=20)))[0].outputs
    assert len({completion.text for completion in found}) > 2
    for completion in found:
        check_text(form, completion.text)


@pytest.mark.parametrize(
    ("form", "begins"),
    [
        ({"json_object": True}, "{"),
        ({"grammar": 'start: "ab" number\nnumber: /[0-9]{2}/ | "(" number ")"'}, "ab"),
        ({"grammar": 'root ::= "x" [0-9]{3}'}, "x"),
    ],
)
def test_objects_and_grammars(folder: Path, form: dict[str, Any], begins: str) -> None:
    asked = params(StructuredOutputsParams(**form), 1)
    completion = with_llm(folder, (1, 1), lambda llm: llm.generate("hello", asked))[0].outputs[0]
    assert completion.text.startswith(begins)
    if "json_object" in form and completion.finish_reason == "stop":
        assert isinstance(json.loads(completion.text), dict)


def test_a_pydantic_model_is_a_schema(folder: Path) -> None:
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("Answer", yes=(bool, ...), count=(pydantic.conint(ge=0, le=99), ...))
    asked = params(StructuredOutputsParams(json=model), 5)
    completion = with_llm(folder, (1, 1), lambda llm: llm.generate("hello", asked))[0].outputs[0]
    model.model_validate_json(completion.text)


def test_lengths_stops_and_other_controls_combine(folder: Path) -> None:
    """min_tokens holds as long as the grammar lets the text go on, and no longer."""
    many, two = StructuredOutputsParams(regex="[a-f]*"), StructuredOutputsParams(regex="[a-f]{2}")
    digits = StructuredOutputsParams(regex="[0-9]{6}")
    asked = [
        params(many, 1, min_tokens=40, max_tokens=60),
        params(two, 2, min_tokens=40),
        params(many, 3, min_tokens=1, max_tokens=5, logit_bias={2: -100}),
        params(digits, 4, stop=["7"], logit_bias=dict.fromkeys(byte_ids("7"), 20)),
        params(digits, 5, allowed_token_ids=[*byte_ids("0123"), 2], top_k=3, repetition_penalty=1.3),
        params(digits, 6, allowed_token_ids=[*byte_ids("abc"), 2], logprobs=2),
        params(digits, 7, temperature=0, top_p=0.5),
    ]
    found = with_llm(folder, (1, 1), lambda llm: llm.generate([[9]] * len(asked), asked))
    long, short, cut, stopped, few, none, greedy = [output.outputs[0] for output in found]
    assert len(long.token_ids) >= 40
    assert (len(short.text), short.finish_reason) == (2, "stop")
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 5)
    assert (stopped.stop_reason, stopped.text.isdigit() or not stopped.text) == ("7", True)
    assert len(few.text) == 6 and set(few.text) <= set("0123")
    assert (none.finish_reason, len(none.logprobs or [])) == ("error", 1)
    assert none.stop_reason == "no token satisfies both the grammar and the other controls of the request"
    assert greedy.text.isdigit() and len(greedy.text) == 6


def byte_ids(letters: str) -> list[int]:
    from tests.structured_cases import make_tokenizer

    return [make_tokenizer().token_to_id(letter) for letter in letters]


def test_a_grammar_that_becomes_too_costly_ends_its_request_alone(folder: Path) -> None:
    costly = StructuredOutputsParams(grammar='start: s\ns: s s s | s s | "a" | "b" |')
    asked = [params(costly, 1, min_tokens=500), params(StructuredOutputsParams(regex="[a-f]{30}"), 2)]

    def use(llm: LLM) -> Any:
        last = {}
        for output in llm.stream([[9], [9]], asked):
            last[output.request_id] = output
        return [last[name].outputs[0] for name in sorted(last)]

    failed, fine = with_llm(folder, (1, 2), use)
    assert failed.finish_reason == "error"
    assert "the grammar cannot go on: " in failed.stop_reason and "max is 500" in failed.stop_reason
    assert fine.finish_reason == "stop"


def test_aborted_in_the_middle(folder: Path) -> None:
    endless, short = StructuredOutputsParams(regex="[a-f]*"), StructuredOutputsParams(regex="[a-f]{20}")

    def use(llm: LLM) -> Any:
        ends = {}
        for count, output in enumerate(llm.stream([[9], [8]], [params(endless, 1), params(short, 1)])):
            if count == 5:
                llm.abort("0")
            ends[output.request_id] = output.outputs[0].finish_reason
        for _ in llm.stream([[9]], params(endless, 1)):
            break  # leaves with a mask on its way
        return ends, llm.generate([[8]], params(short, 1))

    ends, again = with_llm(folder, (1, 1), use)
    assert ends == {"0": "abort", "1": "stop"}
    check_text(short, again[0].outputs[0].text)


def test_a_refused_grammar_is_refused_on_every_rank_and_harms_no_other(folder: Path) -> None:
    good = params(StructuredOutputsParams(regex="[a-f]{3}"), 1)

    def use(llm: LLM) -> Any:
        bad = params(StructuredOutputsParams(regex="(a"), 1)
        with pytest.raises(RequestError, match=r"prompt 1: structured_outputs.regex cannot be used: .*uncl"):
            llm.generate([[5], [6]], [good, bad])
        return llm.generate([[5], [6]], good)

    for output in with_llm(folder, (2, 1), use):
        check_text(StructuredOutputsParams(regex="[a-f]{3}"), output.outputs[0].text)


def test_the_trial_of_grammars_is_ready_before_the_first_and_ends_with_the_llm(folder: Path) -> None:
    with LLM(str(folder), kv_cache_memory_bytes=2**25) as llm:
        process = llm._admission.grammars._trial._process
        assert process is not None and process.poll() is None
        llm.generate([[5]], params(StructuredOutputsParams(regex="[a-f]{3}"), 1))
        assert llm._admission.grammars._trial._process is process
    assert process.poll() is not None
