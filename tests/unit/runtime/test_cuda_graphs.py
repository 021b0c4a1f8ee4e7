"""Which captured step a batch takes. Graphs are played by functions: what they are is CUDA's business."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distllm.runtime import cuda_graphs
from distllm.runtime.cuda_graphs import PromptGraphs, prompt_shape, verification_shapes

LIMITS = [(256, 8192, 4096), (256, 8192, 1024), (27, 64, 96), (1024, 8192, 512), (256, 8192, 96), (1, 16, 16)]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaying a step runs it."""

    def capture(step: Any, pool: object) -> Any:
        return SimpleNamespace(graph=SimpleNamespace(replay=step), output=None)

    monkeypatch.setattr(cuda_graphs, "_capture", capture)


@pytest.mark.usefixtures("played")
@pytest.mark.parametrize("row_len", [2, 5, 9, 33])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_every_batch_of_verifications_finds_a_step(limits: tuple[int, int, int], row_len: int) -> None:
    max_num_seqs, max_tokens, context_len = limits
    seen: list[tuple[list[int], list[int]]] = []

    def step(slots: torch.Tensor, cu_seqlens: torch.Tensor, num_tokens: int) -> None:
        assert cu_seqlens[-1] == num_tokens
        seen.append((slots.tolist(), cu_seqlens.diff().tolist()))

    shapes = verification_shapes(row_len, max_num_seqs, max_tokens, context_len)
    graphs = [PromptGraphs(step, shape, max_num_seqs, torch.device("cpu")) for shape in shapes]
    for each in graphs:
        each.capture(None)
    rng = random.Random(row_len)
    for _ in range(200):
        rows = rng.sample(range(max_num_seqs), rng.randint(1, max_num_seqs))
        counts = [rng.randint(1, rng.randint(1, min(row_len, max_tokens))) for _ in rows]
        while sum(counts) > max_tokens:
            rows.pop(), counts.pop()
        fitting = [each for each in graphs if each.fits(len(rows), sum(counts), max(counts))]
        if not fitting:
            assert sum(counts) > 1536 or context_len < 512, "this one is run operation by operation"
            continue
        ends = torch.tensor([0, *counts]).cumsum(0).tolist()
        fitting[0].replay(rows, ends)
        slots, lengths = seen.pop()
        assert slots == rows + [max_num_seqs] * (len(slots) - len(rows)) and lengths[: len(rows)] == counts
        assert max(lengths[len(rows) :]) <= context_len, "padding is longer than a row can be"
        padding = sum(lengths) - sum(counts)
        assert padding <= max(192, sum(counts) // 2) or sum(counts) < 2 * len(rows), "most of it is padding"


def test_starting_stays_short() -> None:
    counts = [
        sum(len(shape.sizes) for shape in verification_shapes(row_len, max_num_seqs, 8192, 4096))
        for row_len, max_num_seqs in [(5, 256), (9, 1024), (33, 1024)]
    ]
    assert counts[0] <= 17 and max(counts) <= 34
    assert verification_shapes(0, 256, 8192, 4096) == []


def test_the_longest_step_is_rehearsed_however_short_rows_are() -> None:
    lengths: list[int] = []
    shape = prompt_shape(8192, 1024)
    graphs = PromptGraphs(lambda *step: lengths.append(step[2]), shape, 256, torch.device("cpu"))
    graphs.rehearse()
    assert max(shape.sizes) == 1024 and max(lengths) == 8192
