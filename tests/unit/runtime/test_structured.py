"""Structured outputs: whatever a model says, the answer parses and validates; nobody else notices."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from distllm import LLM, RequestError, SamplingParams, StructuredOutputsParams
from distllm.comm.local import LocalControl, run_ranks
from distllm.runtime.guides import Guide
from distllm.runtime.sampler import _masked

HARD: list[dict[str, Any]] = [
    {"json": {"type": "object", "properties": {"é": {"const": "ü🦊"}}, "required": ["é"]}},
    {"json": {"enum": [1, "a", None, [True]]}},
    {"json": '{"type": "array", "items": {"type": "integer", "minimum": -3}, "minItems": 2, "maxItems": 2}'},
    {"json": {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]}},
    {"json": {"$defs": {"p": {"type": "number", "minimum": 0, "maximum": 1}}, "$ref": "#/$defs/p"}},
    {"json": True},
    {"json_object": True},
    {"regex": r"[0-9]{3}-[a-f]{2,5}"},
    {"regex": r"(?i:ja|nein)[!?]{0,2}"},
    {"regex": r"[α-ω]{3}|\p{Lu}{2}"},
    {"choice": ["yes", "no", 'say "so"\n', "日本"]},
    {"grammar": 'start: "a" NUMBER+ "b"\nNUMBER: /[0-9]/'},
    {"grammar": 'root ::= "x" ("y" | "z")* "."'},
]  # fmt: skip


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Bounded, so that the answer ends."""
    kinds = ["integer", "string", "boolean", "null", "enum", "pattern"]
    kind = rng.choice(kinds if depth > 2 else [*kinds, "object", "object", "array", "anyOf"])
    if kind == "integer":
        low = rng.randrange(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(200)}
    if kind == "string":
        return {"type": "string", "minLength": rng.randrange(3), "maxLength": rng.randrange(3, 9)}
    if kind == "enum":
        return {"enum": rng.sample(["a", 1, None, "zwölf", False, -2.5], rng.randint(1, 4))}
    if kind == "pattern":
        return {"type": "string", "pattern": "^" + random_regex(rng) + "$"}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth + 1), "maxItems": rng.randint(1, 3)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
    if kind == "object":
        names = rng.sample(["id", "name", "ä", "x y", "n"], rng.randint(1, 3))
        properties = {name: random_schema(rng, depth + 1) for name in names}
        required = rng.sample(names, rng.randint(0, len(names)))
        closed = {"additionalProperties": False}
        return {"type": "object", "properties": properties, "required": required, **closed}
    return {"type": kind}


def random_regex(rng: random.Random) -> str:
    parts = ["[a-c]{1,3}", "[0-9]{2}", "(x|yy|z)", "-", "[^a-z\\s]", "k?", "[A-F]{0,2}"]
    return "".join(rng.choices(parts, k=rng.randint(1, 4)))


def cases(count: int) -> list[dict[str, Any]]:
    rng = random.Random(count)
    schemas = [{"json": random_schema(rng)} for _ in range(2 * count // 3)]
    return [*schemas, *({"regex": random_regex(rng)} for _ in range(count - len(schemas)))]


def params_of(case: dict[str, Any], seed: int, **fields: Any) -> SamplingParams:
    wanted = StructuredOutputsParams(**case)
    return SamplingParams(structured_outputs=wanted, seed=seed, **{"max_tokens": 900, **fields})


def check(case: dict[str, Any], text: str) -> None:
    if "json" in case or "json_object" in case:
        schema = case.get("json", {"type": "object"})
        jsonschema.validate(json.loads(text), json.loads(schema) if isinstance(schema, str) else schema)
    elif "choice" in case:
        assert text in case["choice"]
    elif "NUMBER" in case.get("grammar", ""):
        assert re.fullmatch("a[0-9]+b", text)
    elif "grammar" in case:
        assert re.fullmatch(r"x[yz]*\.", text)
    elif r"\p" in case["regex"]:
        assert re.fullmatch("[α-ω]{3}", text) or (len(text) == 2 and text.isupper())
    else:
        assert re.fullmatch(case["regex"], text)


def answers(tp: int, pp: int, all_params: list[SamplingParams], **options: Any) -> list[Any]:
    def run(control: LocalControl) -> list[Any]:
        with LLM("demo", tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=control, **options) as llm:
            return llm.generate(["Once upon a time"] * len(all_params), all_params)

    return [output.outputs for output in run_ranks(tp * pp, run, timeout_s=110)[0]]


def check_all(
    all_cases: list[dict[str, Any]], tp: int, pp: int, num_endless: int, **options: Any
) -> list[Any]:
    """num_endless: answers that may be longer than max_tokens."""
    found = answers(tp, pp, [params_of(case, seed) for seed, case in enumerate(all_cases)], **options)
    ended = 0
    for case, (output,) in zip(all_cases, found, strict=True):
        if output.finish_reason == "stop":
            check(case, output.text)
            ended += 1
    assert ended >= len(all_cases) - num_endless
    return [output.token_ids for (output,) in found]


def test_hard_ones_and_random_ones_alike_in_every_layout() -> None:
    all_cases = HARD + cases(9)
    alone = check_all(all_cases, 1, 1, 3)
    assert check_all(all_cases, 2, 2, 3, max_num_seqs=5, max_num_batched_tokens=16) == alone
    assert check_all(all_cases, 1, 2, 3, kv_cache_memory_bytes=3 * 2**20, block_size=8) == alone


@pytest.mark.slow
def test_three_hundred() -> None:
    check_all(cases(300), 1, 1, 0)


def test_samples_of_one_prompt_and_plain_rows_beside_them() -> None:
    plain = SamplingParams(max_tokens=30, seed=5, ignore_eos=True)
    guided = params_of({"regex": "[a-z]{4,9}"}, 1, n=4)
    together = answers(1, 1, [plain, guided, plain])
    assert [o.token_ids for o in together[0]] == [o.token_ids for o in answers(1, 1, [plain])[0]]
    assert len({o.text for o in together[1]}) > 1
    assert all(re.fullmatch("[a-z]{4,9}", o.text) for o in together[1])


def test_with_logit_controls_and_stop_strings() -> None:
    fields = {"logit_bias": {7: -5.0}, "repetition_penalty": 1.3, "top_k": 40, "logprobs": 1}
    ((output,),) = answers(1, 1, [params_of({"choice": ["abc", "abd"]}, 2, **fields)])
    assert output.text in ("abc", "abd") and output.finish_reason == "stop"
    ((output,),) = answers(1, 1, [params_of({"regex": "[a-z]{3}-[a-z]{3}"}, 2, stop="-")])
    assert re.fullmatch("[a-z]{3}", output.text) and output.stop_reason == "-"


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


ITSELF: dict[str, Any] = {}
ITSELF["items"] = ITSELF


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "has nothing; it must have exactly one of"),
        ({"regex": "a", "choice": ["b"]}, "has regex and choice"),
        ({"json": nested(1000)}, "nested more than 64 deep"),
        ({"json": "[" * 10**5}, "characters"),
        ({"json": '{"a":' * 1000}, "nested more than 64 deep"),
        ({"json": ITSELF}, "nested more than 64 deep"),
        ({"json": {"enum": list(range(10**6))}}, "more than 65536 values"),
        ({"json": "x" * 10**7}, "10000000 characters"),
        ({"json": "{"}, "json is no JSON"),
        ({"json": {"const": {1, 2}}}, "json is no schema"),
        ({"json": 5}, "json is a int"),
        ({"regex": "a" * 4097}, "regex has 4097 characters"),
        ({"regex": 5}, "regex is 5"),
        ({"choice": []}, "choice has 0 characters"),
        ({"choice": ["a"] * 1025}, "choice has 1025 entries"),
        ({"choice": [5]}, r"choice\[0\] is 5"),
        ({"grammar": "x" * 10**7}, "grammar has 10000000 characters"),
        ({"json_object": 1}, "json_object is 1"),
    ],
)
def test_bounds(fields: dict[str, Any], text: str) -> None:
    started = time.perf_counter()
    with pytest.raises(RequestError, match=text) as caught:
        StructuredOutputsParams(**fields)
    assert "\n" not in str(caught.value) and time.perf_counter() - started < 1


def test_what_is_refused_harms_nobody() -> None:
    bad = [
        {"regex": "(a+)+$("},
        {"grammar": "start: foo"},
        {"json": {"type": 5}},
        {"json": {"$ref": "http://elsewhere/schema"}},
        {"json": {"not": {"type": "string"}}},
    ]
    with LLM("demo") as llm:
        for case in bad:
            started = time.perf_counter()
            with pytest.raises(RequestError, match=r"prompt 1: structured_outputs: ") as caught:
                llm.generate(["Once", "Once"], [SamplingParams(max_tokens=2), params_of(case, 0)])
            assert "\n" not in str(caught.value) and time.perf_counter() - started < 1
        for fields in ({"min_tokens": 1}, {"ignore_eos": True}):
            with pytest.raises(RequestError, match="with structured_outputs it must be"):
                params_of({"regex": "a"}, 0, **fields)
        assert llm.generate("Once", SamplingParams(max_tokens=2))[0].finished


@pytest.mark.parametrize(
    "regex",
    [
        "((a{1,200}){1,200}b){1,200}[^x]{1000}" * 40,
        "(a{1,10000}){1,10000}",
        "(.*a){30}(b|c)*[^d]{5000}",
        "(x+x+)+y",
    ],
)
def test_what_would_be_catastrophic_elsewhere_harms_nobody(regex: str) -> None:
    plain = SamplingParams(max_tokens=20, seed=5)
    started = time.perf_counter()
    bomb, beside = answers(1, 1, [params_of({"regex": regex}, 0, max_tokens=30), plain])
    assert bomb[0].finish_reason in ("stop", "length", "abort") and time.perf_counter() - started < 10
    assert beside[0].token_ids == answers(1, 1, [plain])[0][0].token_ids


def test_what_gets_too_complex_later_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guide, "advance", lambda self, token_id: False)
    (guided,), (plain,) = answers(1, 1, [params_of({"regex": "[a-z]{9}"}, 0), SamplingParams(max_tokens=5)])
    assert (guided.finish_reason, plain.finish_reason) == ("abort", "length")


def test_masks_on_logits() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(5, 77)).astype(np.float32))
    bits = {slot: rng.random(96) < 0.5 for slot in (9, 2)}
    masks = {slot: np.packbits(row, bitorder="little").tobytes() for slot, row in bits.items()}
    found = _masked(logits, [4, 9, 1, 2, 7], masks)
    wanted = logits.clone()
    for row, slot in ((1, 9), (3, 2)):
        wanted[row, torch.from_numpy(~bits[slot][:77])] = -torch.inf
    assert torch.equal(found, wanted) and _masked(logits, [4, 1], masks) is logits
