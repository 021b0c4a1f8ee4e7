"""Logit controls against plain Python over lists, alone and combined, and typical sampling against NumPy."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from distllm.kernels.reference import penalties
from distllm.kernels.reference.truncation import lowest_kept
from distllm.kernels.reference.typical import keep_typical
from distllm.runtime.sampling.controlled_rows import ControlledRows, History
from distllm.runtime.sampling.logit_controls import NO_CONTROLS, LogitControls
from distllm.runtime.sampling.logits_processors import (
    LogitsProcessor,
    NamedProcessor,
    errors_of,
    errors_to_device,
)
from tests.sampling_cases import typical_by_hand

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 13  # small: tokens and n-grams do repeat
MAX_LEN = 40


def by_hand(logits: list[float], prompt: list[int], output: list[int], c: LogitControls) -> list[float]:
    """As the definitions say, one token after the other."""
    text, new = prompt + output, list(logits)
    if c.allowed_token_ids:
        new = [x if t in c.allowed_token_ids else -math.inf for t, x in enumerate(new)]
    for word in c.bad_words:
        before = list(word[:-1])
        if len(before) <= len(output) and output[len(output) - len(before) :] == before:
            new[word[-1]] = -math.inf
    size = c.no_repeat_ngram_size
    if size:
        tail = text[len(text) - size + 1 :] if size > 1 else []
        for start in range(len(text) - size + 1):
            if len(text) >= size and text[start : start + size - 1] == tail:
                new[text[start + size - 1]] = -math.inf
    for token_id, value in c.logit_bias:
        new[token_id] += value
    for token_id in range(VOCAB):
        if token_id in text:
            x = new[token_id]
            new[token_id] = x / c.repetition_penalty if x > 0 else x * c.repetition_penalty
        times = output.count(token_id)
        new[token_id] -= c.frequency_penalty * times + (c.presence_penalty if times else 0)
    return new


FIELDS = {
    "allowed_token_ids": lambda rng: tuple(rng.sample(range(VOCAB), rng.randint(1, VOCAB))),
    "bad_words": lambda rng: tuple(
        tuple(rng.randrange(VOCAB) for _ in range(rng.choice([1, 1, 2, 3, 5])))
        for _ in range(rng.randint(1, 9))
    ),
    "no_repeat_ngram_size": lambda rng: rng.choice([1, 2, 2, 3, 4, MAX_LEN + 9]),
    "logit_bias": lambda rng: tuple(
        (t, rng.uniform(-9, 9)) for t in rng.sample(range(VOCAB), rng.randint(1, VOCAB))
    ),
    "repetition_penalty": lambda rng: rng.choice([0.5, 1.3, 7.0]),
    "presence_penalty": lambda rng: rng.uniform(-2, 2),
    "frequency_penalty": lambda rng: rng.uniform(-2, 2),
}


def random_controls(rng: random.Random, fields: list[str]) -> LogitControls:
    return replace(NO_CONTROLS, **{name: FIELDS[name](rng) for name in fields})


def check(
    rng: random.Random, controls: list[LogitControls | None], dtype: torch.dtype = torch.float32
) -> None:
    """A batch of rows in shuffled slots, some shorter than what came of earlier requests in their slots."""
    num_rows = len(controls)
    slots = rng.sample(range(num_rows + 5), num_rows)
    table = torch.tensor([[rng.randrange(VOCAB) for _ in range(MAX_LEN)] for _ in range(num_rows + 5)]).int()
    lengths = [rng.randint(1, MAX_LEN) for _ in controls]
    prompts = [rng.randint(1, length) for length in lengths]
    logits = torch.tensor([[rng.gauss(0, 3) for _ in range(VOCAB)] for _ in controls]).to(dtype)
    before = logits.clone()
    parts = (table, torch.tensor(slots), torch.tensor(lengths), torch.tensor(prompts))
    history = History(*(part.to(DEVICE) for part in parts))
    found = ControlledRows(controls, [], DEVICE).apply(logits.to(DEVICE), history)[0].cpu()
    assert torch.equal(logits, before) and found.dtype == torch.float32
    for row, entry in enumerate(controls):
        text = table[slots[row], : lengths[row]].tolist()
        values = logits[row].float().tolist()
        wanted = by_hand(values, text[: prompts[row]], text[prompts[row] :], entry) if entry else values
        np.testing.assert_allclose(found[row].numpy(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("field", FIELDS)
def test_each_control_alone(field: str) -> None:
    rng = random.Random(field)
    for _ in range(20):
        check(rng, [random_controls(rng, [field]) for _ in range(8)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_controls_combined(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalties, "COLUMNS", 7)  # several pieces of the token table
    rng = random.Random(1)
    for _ in range(60):
        rows = [random_controls(rng, rng.sample(list(FIELDS), rng.randint(1, len(FIELDS)))) for _ in range(8)]
        check(rng, [row if rng.random() < 0.8 else None for row in rows], dtype)


def test_processors_see_the_text_and_change_their_row_alone() -> None:
    seen: list[list[int]] = []

    def double(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append(token_ids)
        return logits * 2

    def add_one(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits.add_(1)

    parts = ([[5, 6, 7], [1, 2, 3]], [1, 0], [2, 3], [1, 1])
    history = History(*(torch.tensor(part, device=DEVICE) for part in parts))
    logits = torch.arange(6.0, device=DEVICE).view(2, 3)
    named = [NamedProcessor("add_one", add_one), NamedProcessor("double", double)]
    rows = ControlledRows([LogitControls(processors=(1, 0)), None], named, DEVICE)
    changed, errors = rows.apply(logits, history)
    assert changed.tolist() == [[1, 3, 5], [3, 4, 5]] and seen == [[1, 2]] and errors == [""]


def fail(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    token_ids.clear()
    logits.zero_()
    raise RuntimeError("two\nlines " + "é" * 400)


WRONG: dict[str, tuple[LogitsProcessor, str]] = {
    "raises": (fail, r"raised RuntimeError in test_controlled_rows.py, line \d+: two lines é{50}"),
    "list": (lambda ids, logits: logits.tolist(), "returned a list; it must return the row of logits"),
    "none": (lambda ids, logits: None, "returned a NoneType; it must"),  # type: ignore[arg-type,return-value]
    "shape": (lambda ids, logits: logits[:2], r"returned \[2\] of torch.float32; it must return \[3\] of"),
    "dtype": (lambda ids, logits: logits.long(), r"returned \[3\] of torch.int64; it must return \[3\] of"),
    "nan": (
        lambda ids, logits: logits - torch.inf + torch.inf,
        "returned logits whose highest is nan; it must",
    ),
    "none left": (lambda ids, logits: logits - torch.inf, "returned logits whose highest is -inf; it must"),
    "all": (lambda ids, logits: logits + torch.inf, "returned logits whose highest is inf; it must"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_processor_that_fails_leaves_its_row_and_says_why(name: str) -> None:
    function, text = WRONG[name]
    named = [NamedProcessor(name, function), NamedProcessor("add", lambda ids, logits: logits + len(ids))]
    parts = ([[5, 6, 7], [1, 2, 3]], [1, 0], [2, 3], [1, 1])
    history = History(*(torch.tensor(part, device=DEVICE) for part in parts))
    logits = torch.arange(6.0, device=DEVICE).view(2, 3)
    rows = ControlledRows([LogitControls(processors=(1, 0)), LogitControls(processors=(1,))], named, DEVICE)
    changed, errors = rows.apply(logits, history)
    assert changed.tolist() == [[0, 1, 2], [6, 7, 8]]
    there = errors_of(errors_to_device(errors, DEVICE).cpu())
    assert re.match(f"logits processor '{name}' {text}", there[0]) and there[1] == ""
    assert "\n" not in errors[0] and len(there[0].encode()) <= 256


def test_rows_serve_their_own_composition_only() -> None:
    one, other = LogitControls(no_repeat_ngram_size=2), LogitControls(no_repeat_ngram_size=2)
    rows = ControlledRows([one, None], [], DEVICE)
    assert rows.serves([one, None])
    for controls in ([None, one], [one], [other, None], [one, None, None]):
        assert not rows.serves(controls)


def test_typical_keeps_what_fp64_keeps() -> None:
    rng = np.random.default_rng(0)
    num_rows = 300
    logits = rng.normal(0, 3, (num_rows, 29))
    heat = rng.choice([0.3, 1.0, 2.0], num_rows)
    mass = rng.choice([0.05, 0.3, 0.7, 0.95], num_rows)
    top_k = rng.choice([0, 1, 7], num_rows)
    columns = [torch.from_numpy(x) for x in (heat, top_k, np.ones(num_rows), np.zeros(num_rows))]
    lowest = lowest_kept(torch.from_numpy(logits), *columns)
    found = keep_typical(
        torch.from_numpy(logits).float(), columns[0].float(), lowest, torch.from_numpy(mass).float()
    )
    for row, kept in enumerate(torch.isfinite(found).numpy()):
        tempered = np.where(logits[row] >= lowest[row].item() - 1e-6, logits[row], -np.inf) / heat[row]
        strict, lax = typical_by_hand(tempered, mass[row], 1e-5)
        assert (kept[strict]).all() and (lax[kept]).all()
