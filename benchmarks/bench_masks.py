"""Host time of the masks of structured outputs, a step: consuming tokens and finding what may follow.

    python benchmarks/bench_masks.py

On the engine's threads; no device and no ranks. The vocabulary has 128,000 made-up tokens: bytes,
words, words with a blank or JSON punctuation before. Each row goes through its grammar at random and begins
again when it ends. The first steps, in which lexers are built, are counted too.
"""

from __future__ import annotations

import random
import time
from statistics import quantiles
from typing import Any

import numpy as np

from distllm.runtime.plan import RowSampling, StepPlan
from distllm.runtime.plan_codec import decode_message, encode
from distllm.runtime.request import Request
from distllm.runtime.structured.constraint import Constraint, ConstraintThreads
from distllm.runtime.structured.grammars import Grammars
from distllm.runtime.structured.structured_outputs import StructuredOutputsParams

BATCH_SIZE, VOCAB_SIZE, NUM_STEPS = 64, 128_000, 200
EOS = VOCAB_SIZE - 1
FIRSTS, VOWELS = "bcdfghjklmnpqrstvwz", "aeiou"
BEFORE = ["", "", " ", " ", " ", '"', ' "', '{"', '":', '", "', "\n  ", "["]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
        },
    },
    "required": ["name", "age", "tags", "address"],
}
FORMS: dict[str, dict[str, Any]] = {
    "JSON schema": {"json": PERSON},
    "JSON object": {"json_object": True},
    "regex": {"regex": r"[A-Z][a-z ]{10,400}\."},
    "grammar": {"grammar": 'start: sum\nsum: term ("+" term)*\nterm: /[0-9]+/ | "(" sum ")"'},
}


class Vocabulary:
    """Stands for a tokenizer, as far as grammars ask for one."""

    def __init__(self) -> None:
        rng, made = random.Random(0), dict.fromkeys(bytes([byte]) for byte in range(256))
        while len(made) < EOS:
            syllables = (rng.choice(FIRSTS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 4)))
            made[(rng.choice(BEFORE) + "".join(syllables)).encode()] = None
        self._tokens = [*made]
        self.special_tokens = {"<|end|>": EOS}

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id] if token_id < EOS else b""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


def choose(request: Request, rng: random.Random) -> int:
    assert request.constraint is not None and request.constraint.error is None
    bits = np.unpackbits(np.frombuffer(request.constraint.mask, dtype=np.uint8), bitorder="little")
    return int(rng.choice(np.flatnonzero(bits)))


def make_request(grammars: Grammars, form: StructuredOutputsParams) -> Request:
    constraint: Constraint = grammars.constraints(form, 1, 0, [EOS])[0]
    return Request("", (0,), 1, RowSampling(), constraint=constraint)


def bench(grammars: Grammars, form: StructuredOutputsParams) -> tuple[list[float], list[float]]:
    """Milliseconds of a step of BATCH_SIZE rows: of the masks, and of their way into and out of a plan."""
    rng, threads = random.Random(0), ConstraintThreads()
    rows = [make_request(grammars, form) for _ in range(BATCH_SIZE)]
    masks_ms, plan_ms = [], []
    for step in range(NUM_STEPS):
        tokens = [choose(row, rng) for row in rows]
        for number in [number for number, token_id in enumerate(tokens) if token_id == EOS]:
            rows[number] = make_request(grammars, form)
            tokens[number] = choose(rows[number], rng)
        start = time.perf_counter()
        threads.advance([(row, [token]) for row, token in zip(rows, tokens, strict=True)])
        num_ready = 0
        while num_ready < BATCH_SIZE:
            num_ready += len(threads.collect(None))
        between = time.perf_counter()
        masks = {slot: row.constraint.mask for slot, row in enumerate(rows) if row.constraint}
        decode_message(encode(StepPlan(step, [*masks], token_masks=masks)))
        masks_ms.append(1e3 * (between - start))
        plan_ms.append(1e3 * (time.perf_counter() - between))
    return masks_ms, plan_ms


def main() -> None:
    grammars = Grammars(Vocabulary(), VOCAB_SIZE, [EOS])  # type: ignore[arg-type]
    start = time.perf_counter()
    grammars.constraints(StructuredOutputsParams(regex="a"), 1, 0, [EOS])
    print(f"first grammar, with the vocabulary: {time.perf_counter() - start:.2f} s")
    print(f"ms per step of {BATCH_SIZE} rows   compile    median      p90      max   in plans")
    for name, form in FORMS.items():
        params = StructuredOutputsParams(**form)
        start = time.perf_counter()
        grammars.constraints(params, 1, 0, [EOS])
        compile_ms = 1e3 * (time.perf_counter() - start)
        masks_ms, plan_ms = bench(grammars, params)
        cuts, of_plan = quantiles(masks_ms, n=10), quantiles(plan_ms, n=2)[0]
        figures = (compile_ms, cuts[4], cuts[8], max(masks_ms), of_plan)
        print(f"{name:21}" + "".join(f"{figure:10.2f}" for figure in figures))


if __name__ == "__main__":
    main()
