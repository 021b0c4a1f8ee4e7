"""What is refused, how fast, and in which words; what a grammar allows, against brute force."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from distllm import RequestError, SamplingParams, StructuredOutputsParams
from distllm.engine.tokenizers import load_tokenizer
from distllm.runtime.sampling.token_masks import apply_masks
from distllm.runtime.structured import constraint as constraints
from distllm.runtime.structured.constraint import (
    LIGHT_S,
    NUM_THREADS,
    SLOW_S,
    Constraint,
    ConstraintThreads,
)
from distllm.runtime.structured.grammar_trial import TOO_COSTLY, GrammarTrial
from distllm.runtime.structured.grammars import Grammars
from tests.tokenizers import KINDS, LOSSLESS

EOS = 256
TOKENS = [*(bytes([byte]) for byte in range(256)), b"", b"ab", b"ba", b"a", "é".encode(), b"", b"cab"]


class Bytes:
    """All bytes, some words, a byte twice, an id without a token."""

    special_tokens: ClassVar = {"<|end|>": EOS}
    stop_token_ids: frozenset[int] = frozenset()
    vocab_size = len(TOKENS)

    def token_bytes(self, token_id: int) -> bytes:
        return TOKENS[token_id] if token_id < len(TOKENS) else b""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(Bytes(), 270, [EOS])  # type: ignore[arg-type]


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def cyclic() -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array"}
    schema["items"] = schema
    return schema


def object_of(*names: str) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"type": "integer"} for name in names}}


def doubling(times: int) -> str:
    return "".join(f"R{i}: R{i + 1} R{i + 1}\n" for i in range(times))


PLACES = {f"p{i}": {"type": "string"} for i in range(300_000)}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two": ({"regex": "a", "json_object": True}, "has json_object and regex; give exactly one of json"),
    "none": ({}, "has nothing; give exactly one"),
    "no bool": ({"json_object": 1}, "json_object is 1; it must be True or False"),
    "deep": ({"json": nested(1000)}, "json is nested 101 deep or more; at most 100 is allowed"),
    "very deep": ({"json": nested(100_000)}, "json is nested 101 deep or more"),
    "deep text": ({"json": '{"items":' * 1000 + "1" + "}" * 1000}, "json is nested 1000 deep"),
    "deep in a list": ({"json": {"anyOf": json.loads("[" * 900 + "]" * 900)}}, "json is nested 101 deep"),
    "cyclic": ({"json": cyclic()}, "json is nested 101 deep or more"),
    "10 MB": ({"json": {"properties": PLACES}}, "json has 1310.. characters or more; at most 131072"),
    "10 MB text": ({"json": '{"a": "' + "x" * 10**7 + '"}'}, r"json has 10000009 characters; .* 1 to 131072"),
    "quotes": ({"json": '"' + '\\"' * 60_000}, "json is no JSON"),
    "no JSON": ({"json": "{"}, "json is no JSON: Expecting property name"),
    "a list": ({"json": "[]"}, r"json is \[\]; it must be a JSON schema, which is an object"),
    "a set": ({"json": {"enum": {1}}}, "json is no JSON: "),
    "NaN": ({"json": {"const": float("nan")}}, "json cannot be used: "),
    "unsupported": ({"json": {"type": "array", "uniqueItems": True}}, r'cannot be used: .*\["uniqueItems"\]'),
    "no type": ({"json": {"type": "text"}}, "json cannot be used: Invalid type: text"),
    "remote": ({"json": {"$ref": "http://localhost/x"}}, "json cannot be used: Resource"),
    "impossible": ({"json": {"type": "integer", "minimum": 3, "maximum": 2}}, "cannot be used: Unsatisf"),
    "endless": ({"json": {"$ref": "#"}}, "json cannot be used: "),
    "open": ({"regex": "(a"}, "regex cannot be used: error: unclosed group"),
    "look-around": ({"regex": "(?=a)b"}, "regex cannot be used: error: look-around"),
    "long": ({"regex": "a" * 10_000}, "regex has 10000 characters; it must have 1 to 8192"),
    "empty": ({"regex": ""}, "regex has 0 characters; it must have 1 to 8192"),
    "no text": ({"regex": 3}, "regex is 3; it must be a string"),
    "half": ({"regex": "\ud800"}, "regex is no Unicode text"),
    "nested groups": ({"regex": "(" * 4000 + "a" + ")" * 4000}, "regex cannot be used: error: exceed"),
    "choices": ({"choice": ["a"] * 2000}, "choice has 2000 entries; at most 1024 are allowed"),
    "no choice": ({"choice": []}, "choice is empty"),
    "a text": ({"choice": "abc"}, "choice is 'abc'; it must be a list"),
    "bad choice": ({"choice": ["a", 1]}, r"choice\[1\] is 1; it must be a string"),
    "long choices": ({"choice": ["a" * 1024] * 1024}, "choice has 1048576 characters or more"),
    "Lark": ({"grammar": "start: foo"}, "grammar cannot be used: .*unknown name"),
    "Lark quote": ({"grammar": 'start: "a'}, "grammar cannot be used: .*lexer error"),
    "EBNF": ({"grammar": "root ::= ("}, "grammar cannot be used: "),
    "brackets": ({"grammar": "start: " + "(" * 60_000}, "grammar is nested 60000 deep"),
    "schema inside": ({"grammar": "start: %json " + '{"items":' * 500}, "grammar is nested 500 deep"),
    "the stack": (
        {"grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(7000)) + 'r7000: "a"'},
        f"grammar cannot be used: {TOO_COSTLY}",
    ),
    "endless refs": (
        {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
        "json cannot be used: ",
    ),
    "no such text": ({"json": {"allOf": [{"type": "integer"}, {"type": "string"}]}}, "cannot be used: Unsat"),
    "no such place": ({"json": object_of() | {"properties": {"a": False}, "required": ["a"]}}, "json cannot"),
    "places alike": ({"json": {"type": "object", "patternProperties": {"^a": {}, "b$": {}}}}, "not disjoint"),
    "products": (
        {"json": {"allOf": [{"anyOf": [object_of(f"{i}", f"{j}") for j in range(4)]} for i in range(12)]}},
        "schema too large",
    ),
    "patterns": (
        {"json": {"allOf": [{"type": "string", "pattern": f"^.*{c}.{{9}}$"} for c in "abcdef"]}},
        "json cannot be used: Unable to determine",
    ),
    "places": ({"json": object_of(*(f"p{i}" for i in range(3500)))}, TOO_COSTLY),
    "doubling": ({"grammar": "start: R0\n" + doubling(40) + 'R40: "a"'}, TOO_COSTLY),
    "recursion": ({"grammar": "start: start"}, "grammar cannot be used: "),
    "no way out": ({"grammar": "start: a\na: b\nb: a"}, "grammar cannot be used: "),
    "both at once": ({"grammar": "start: A\nA: /.*a.{14}/ & /.*b.{14}/"}, "grammar cannot be used: "),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_inputs_are_refused_at_once_in_one_line(grammars: Grammars, name: str) -> None:
    """In 100 ms: those 80 that a trial may take, and less than 20 here. Of the processor's time: a busy
    machine stretches the clock's."""
    wrong, text = REFUSED[name]
    costs: list[float] = []
    while not costs or (min(costs) >= 0.02 and len(costs) < 3):
        start = time.process_time()
        with pytest.raises(RequestError, match=f"^structured_outputs.*{text}") as refused:
            grammars.constraints(StructuredOutputsParams(**wrong), 1, 0, [EOS])
        costs.append(time.process_time() - start)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    assert min(costs) < 0.02, costs


def test_a_grammar_without_an_end_has_its_time_and_harms_no_other(grammars: Grammars) -> None:
    """Nobody waits for a process that starts: the next one is there."""
    costly = StructuredOutputsParams(json={"type": "integer", "multipleOf": 99_999_989})
    grammars.constraints(StructuredOutputsParams(regex="a"), 1, 0, [EOS])
    process = grammars._trial._process
    assert process is not None
    before = cpu_s_of_ended(process.pid)
    for regex in ("ab", "abc", "abcd"):
        with pytest.raises(RequestError, match=TOO_COSTLY):
            grammars.constraints(costly, 1, 0, [EOS])
        assert grammars.constraints(StructuredOutputsParams(regex=regex), 1, 0, [EOS])
    assert grammars._trial._process is process
    assert 0.07 < (cpu_s_of_ended(process.pid) - before) / 3 < 0.1


def cpu_s_of_ended(pid: int) -> float:
    """What the children of a process had used when they ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")


def test_a_trial_that_the_system_ends_is_started_again() -> None:
    trial = GrammarTrial()
    for ends in (signal.SIGKILL, None):
        assert trial.check("regex", "(a").endswith("unclosed group")
        assert trial.check("regex", "a") == ""
        if ends and trial._process:
            trial._process.send_signal(ends)
            trial._process.wait()
    trial.close()


def test_where_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines start all the same; a grammar is refused in one line."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    grammars = Grammars(Bytes(), 270, [EOS])  # type: ignore[arg-type]
    grammars.start()
    with pytest.raises(RequestError, match="tries grammars cannot be started: Resource temporarily unavail"):
        grammars.constraints(StructuredOutputsParams(regex="a"), 1, 0, [EOS])
    grammars.close()


def test_large_grammars_are_not_refused(grammars: Grammars) -> None:
    """As large as the schemas of big programs: 60,000 characters, 800 places. They need a third of what a try
    may cost."""
    kinds: list[dict[str, Any]] = [
        {"type": "string", "maxLength": 40, "description": "what is told of it in a few words"},
        {"type": ["integer", "null"]},
        {"enum": ["first", "second", "third"]},
        {"type": "array", "items": {"type": "number"}},
        {"type": "string", "pattern": "^[a-z]{1,9}-[0-9]{4}$"},
    ]

    def section(makes: list[dict[str, Any]]) -> dict[str, Any]:
        places = {f"place_{i}": each for i, each in enumerate(makes)}
        return {"type": "object", "properties": places, "required": list(places)}

    schema = section([section([kinds[(i + j) % 5] for j in range(16)]) for i in range(50)])
    assert 60_000 < len(json.dumps(schema)) < 70_000
    assert grammars.constraints(StructuredOutputsParams(json=schema), 1, 0, [EOS])


@pytest.mark.parametrize("regex", ["(a+)+$", "(x+x+)+y", "(a|a)*b", "(.*a){50}", "a{1,10000}{1,10000}"])
def test_what_makes_other_engines_backtrack_is_harmless(grammars: Grammars, regex: str) -> None:
    rng = random.Random(0)
    start = time.perf_counter()
    (constraint,) = grammars.constraints(StructuredOutputsParams(regex=regex), 1, 0, [EOS])
    for _ in range(60):
        if constraint.error is None and (inside := allowed(constraint) - {EOS}):
            constraint.advance([rng.choice(sorted(inside))])
    assert time.perf_counter() - start < 1


def allowed(constraint: Constraint) -> set[int]:
    bits = np.unpackbits(np.frombuffer(constraint.mask, dtype=np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


WORDS = ["a", "ab", "abc", "cab", "b", "éa", "é"]
LANGUAGES: list[tuple[dict[str, Any], Callable[[str], object]]] = [
    ({"regex": "(ab|ba)?a*c?"}, re.compile("(ab|ba)?a*c?").fullmatch),
    ({"regex": "é?[aé]{2,3}"}, re.compile("é?[aé]{2,3}").fullmatch),
    ({"choice": WORDS}, WORDS.__contains__),
    ({"grammar": 'start: "c" | "a" inner "b"\ninner: "c" | "a" "c" "b"'}, ["c", "acb", "aacbb"].__contains__),
]


@pytest.mark.parametrize(("form", "accepts"), LANGUAGES)
def test_masks_are_what_the_language_lets_follow(
    grammars: Grammars, form: dict[str, Any], accepts: Callable[[str], object]
) -> None:
    """After every text of up to two letters: each token allowed begins the rest of a word, each first byte of
    a rest is some token's, and the end is allowed after a word."""
    texts = ["".join(letters) for n in range(6) for letters in product("abcé", repeat=n)]
    language = [text.encode() for text in texts if accepts(text)]
    for known in (text.encode() for text in texts if len(text) <= 2):
        rests = [word[len(known) :] for word in language if word.startswith(known)]
        (constraint,) = grammars.constraints(StructuredOutputsParams(**form), 1, 0, [EOS])
        if not follow(constraint, known):
            assert not rests, known
            continue
        tokens = [TOKENS[n] for n in allowed(constraint) - {EOS}]
        assert all(any(rest.startswith(token) for rest in rests) for token in tokens), known
        assert {token[0] for token in tokens} == {rest[0] for rest in rests if rest}, known
        assert (EOS in allowed(constraint)) == (b"" in rests), known


def follow(constraint: Constraint, text: bytes) -> bool:
    """Whether the constraint lets these bytes come, one after the other."""
    for byte in text:
        if byte not in allowed(constraint):
            return False
        constraint.advance([byte])
    return True


@pytest.mark.parametrize("kind", sorted(LOSSLESS))
def test_every_kind_of_tokenizer_spells_it(kind: str, tmp_path: Path) -> None:
    """Where one text is left, too: some tokenizers would begin it with a blank."""
    KINDS[kind](tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    eos = max(tokenizer.special_tokens.values())
    made = Grammars(tokenizer, tokenizer.vocab_size + 5, [eos])
    choice = ["abc xyz. 漢", "abcd", " the cat 🙂"]
    rng = random.Random(0)
    for constraint in made.constraints(StructuredOutputsParams(choice=choice), 20, 0, [eos]):
        written = b""
        while (token_id := rng.choice(sorted(allowed(constraint)))) != eos:
            written += tokenizer.token_bytes(token_id)
            constraint.advance([token_id])
            assert constraint.error is None
        assert written.decode() in choice


def test_min_tokens_keeps_the_end_away_while_anything_else_is_left(grammars: Grammars) -> None:
    (constraint,) = grammars.constraints(StructuredOutputsParams(regex="a{0,2}"), 1, 9, [EOS, 98])
    seen = []
    for _ in range(3):
        seen.append(EOS in allowed(constraint))
        if not seen[-1]:
            constraint.advance([97])
    assert seen == [False, False, True]


def test_samples_of_equal_grammars_are_apart(grammars: Grammars) -> None:
    form = StructuredOutputsParams(regex="[ab]{9}c")
    first, second = grammars.constraints(form, 2, 0, [EOS])
    first.advance([97])
    assert allowed(second) == allowed(grammars.constraints(form, 1, 0, [EOS])[0])
    before = grammars._compiled.cache_info().hits
    grammars.constraints(form, 1, 0, [EOS])
    assert grammars._compiled.cache_info().hits == before + 1


def test_a_model_that_cannot_be_held_to_a_form() -> None:
    form = StructuredOutputsParams(regex="a")
    with pytest.raises(RequestError, match="need a tokenizer"):
        Grammars(None, 270, [EOS]).constraints(form, 1, 0, [])
    with pytest.raises(RequestError, match="need an end-of-sequence token"):
        Grammars(Bytes(), 270, []).constraints(form, 1, 0, [])  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="ignore_eos is True; structured_outputs end with eos"):
        SamplingParams(structured_outputs=form, ignore_eos=True)
    with pytest.raises(RequestError, match="it must be a StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_on_the_device(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    for vocab_size in (1, 31, 32, 33, 270, 1000):
        logits = torch.randn(6, vocab_size).to(dtype)
        bits = rng.random((3, -(-vocab_size // 32) * 32)) < 0.5
        packed = np.packbits(bits, axis=1, bitorder="little")
        slots, kept = [9, 4, 7, 0, 2, 5], logits.clone()
        masks = {slot: row.tobytes() for slot, row in zip((0, 9, 4), packed, strict=True)}
        found = apply_masks(logits, slots, masks)
        expected = logits.float().numpy().copy()
        for row, of in ((3, 0), (0, 1), (1, 2)):
            expected[row, ~bits[of, :vocab_size]] = -np.inf
        assert np.array_equal(found.float().numpy(), expected) and found.dtype == dtype
        assert torch.equal(logits, kept)
        assert apply_masks(logits, [8, 3, 1, 6, 10, 11], masks) is logits


def test_threads_share_no_matcher(grammars: Grammars) -> None:
    """Copies of one matcher have a lock in common: neighbours come from different ones."""
    made = grammars.constraints(StructuredOutputsParams(regex="[xyz]{7}"), 2 * NUM_THREADS, 0, [EOS])
    assert [constraint.lineage for constraint in made] == [*range(NUM_THREADS)] * 2
    assert all(constraint.mask == made[0].mask for constraint in made)


def made_requests(grammars: Grammars, form: StructuredOutputsParams, count: int, min_tokens: int = 0) -> Any:
    class Asking:
        def __init__(self, constraint: Constraint) -> None:
            self.constraint = constraint

    return [Asking(each) for each in grammars.constraints(form, count, min_tokens, [EOS])]


@pytest.mark.parametrize(
    "form", [{"json_object": True}, {"regex": "[a-c ]{3,9}x?"}, {"choice": ["abc", "ab"]}]
)
def test_masks_found_together_are_those_found_alone(grammars: Grammars, form: dict[str, Any]) -> None:
    rng, threads = random.Random(1), ConstraintThreads()
    together, alone = (made_requests(grammars, StructuredOutputsParams(**form), 5, 2) for _ in range(2))
    for request in alone:
        request.constraint.cost_s = 2 * LIGHT_S
    steps = 0
    while together:
        assert [r.constraint.mask for r in together] == [r.constraint.mask for r in alone]
        tokens = [[rng.choice(sorted(allowed(request.constraint)))] for request in together]
        going = [number for number, (token_id,) in enumerate(tokens) if token_id != EOS and steps < 40]
        together, alone = [together[n] for n in going], [alone[n] for n in going]
        tokens, steps = [tokens[n] for n in going], steps + 1
        threads.advance([*zip(together, tokens, strict=True), *zip(alone, tokens, strict=True)])
        ready: list[Any] = []
        while len(ready) < 2 * len(going):
            ready += threads.collect(None)
        assert set(ready) == {*together, *alone}
        for request in alone:
            request.constraint.cost_s = 2 * LIGHT_S
    assert steps > 1


def test_a_token_that_a_grammar_forbids_ends_its_request_alone(grammars: Grammars) -> None:
    first, second = made_requests(grammars, StructuredOutputsParams(regex="[ab]{9}"), 2)
    threads = ConstraintThreads()
    threads.advance([(first, [ord("x")]), (second, [ord("a")])])
    assert threads.collect(0) == [first, second]
    assert "no token satisfies" in first.constraint.error and second.constraint.error is None


def test_what_takes_long_together_is_timed_alone(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes back, or is left to itself."""
    requests = made_requests(grammars, StructuredOutputsParams(regex="[ab]{9}"), 3)
    threads, clock = ConstraintThreads(), iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: next(clock))
        threads.advance([(request, [ord("a")]) for request in requests])
    assert threads.collect(0) == requests and not any(r.constraint.is_light for r in requests)
    threads.advance([(request, [ord("b")]) for request in requests])
    found: list[Any] = []
    while len(found) < 3:
        found += threads.collect(None)
    assert all(r.constraint.is_light for r in requests), "a mask of this grammar takes a few microseconds"


def test_jobs_of_threads() -> None:
    class Costly:
        def __init__(self, number: int, cost_s: float) -> None:
            self.lineage, self.is_slow = number % NUM_THREADS, cost_s > SLOW_S

    class Asking:
        def __init__(self, number: int, cost_s: float) -> None:
            self.constraint = Costly(number, cost_s)

    costs = [SLOW_S] * NUM_THREADS + [2 * SLOW_S] * 3 + [SLOW_S] * 2 * NUM_THREADS
    tokens: Any = [(Asking(number, cost_s), [1]) for number, cost_s in enumerate(costs)]
    jobs = constraints._jobs(tokens)
    assert sorted(map(len, jobs)) == [1] * 3 + [3] * NUM_THREADS
    assert {id(each) for job in jobs for each in job} == {id(each) for each in tokens}
    for job in jobs:
        assert len({each[0].constraint.lineage for each in job}) == 1
        assert len(job) == 1 or not any(each[0].constraint.is_slow for each in job)
