"""Steps as CUDA graphs, one for each size of batch. Knows step functions; never a plan.

A captured step reads slots (and lengths) from static buffers and finds everything else in the slot tables,
so a replay needs no other input. What fills a size up belongs to a padding slot of its own, whose KV nobody
reads. The tensors of an output are overwritten by the next replay of any graph: they share their memory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, takewhile
from typing import Generic, TypeVar

import torch

from distllm.runtime.staging import to_device

Output = TypeVar("Output")

PROMPT_ROWS = 8  # rows of a captured prompt step, its padding row not counted
PROMPT_TOKENS = (
    32,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
    640,
    768,
    896,
    1024,
)  # beyond, launches hide behind work
VERIFY_ROWS = (1, 8, 64)  # of captured verifications, and then max_num_seqs
VERIFY_TOKENS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 576, 640, 768, 1024, 1280, 1536, 2048)
FEW_TOKENS = 192  # fewer are computed in hardly less time


@dataclass(frozen=True)
class PromptShape:
    """Of captured steps: rows at most, and the numbers of tokens that are captured."""

    num_rows: int
    sizes: tuple[int, ...]  # ascending
    longest: int  # tokens of a step that is rehearsed, captured or not
    row_len: int = 0  # tokens of a row at most, if that is known


def prompt_shape(max_tokens: int, context_len: int) -> PromptShape:
    """Of short prompts; max_tokens: of a step."""
    sizes = tuple(size for size in PROMPT_TOKENS if size <= min(max_tokens, context_len))
    return PromptShape(PROMPT_ROWS, sizes, max_tokens)


def verification_shapes(
    row_len: int, max_num_seqs: int, max_tokens: int, context_len: int
) -> list[PromptShape]:
    """Of steps with up to row_len tokens a row, the smallest first: a token and its drafts. None for 0.
    max_tokens: of a step; context_len: of a row, which the padding is, too.
    """
    shapes = []
    every = sorted({rows for rows in VERIFY_ROWS if rows < max_num_seqs} | {max_num_seqs})
    for num_rows in every if row_len else ():
        most = min(-(-num_rows * row_len // 8) * 8, max_tokens)
        fewest = min(num_rows, FEW_TOKENS)
        sizes = [size for size in VERIFY_TOKENS if fewest < size < most]
        if most <= VERIFY_TOKENS[-1]:
            sizes.append(most)
        close = takewhile(lambda pair: pair[1] - pair[0] <= context_len, pairwise((0, *sizes)))
        shapes.append(PromptShape(num_rows, tuple(size for _, size in close), most, row_len))
    return shapes


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Batches that are captured, ascending: so close that at most 7 rows of a large one are padding."""
    small = [size for size in (1, 2, 4) if size < max_num_seqs]
    return [*small, *range(8, max_num_seqs, 8), max_num_seqs]


@dataclass(frozen=True)
class _Captured(Generic[Output]):
    graph: torch.cuda.CUDAGraph
    output: Output


def _capture_all(
    step: Callable[[int], Output], sizes: Sequence[int], pool: object
) -> dict[int, _Captured[Output]]:
    """The largest first, so that the smaller ones fit into its memory."""
    return {size: _capture(partial(step, size), pool) for size in reversed(sizes)}


def _capture(step: Callable[[], Output], pool: object) -> _Captured[Output]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):  # type: ignore[arg-type]
        output = step()
    return _Captured(graph, output)


class DecodeGraphs(Generic[Output]):
    """step(slots) runs one token of each slot."""

    def __init__(
        self,
        step: Callable[[torch.Tensor], Output],
        max_num_seqs: int,
        padding_slot: int,
        device: torch.device,
    ) -> None:
        self._slots = torch.full((max_num_seqs,), padding_slot, dtype=torch.int64, device=device)
        self._padding_slot = padding_slot
        self._loaded: list[int] = []  # what the buffer holds, padding left out
        self._sizes = batch_sizes(max_num_seqs)
        self._step = step
        self._captured: dict[int, _Captured[Output]] = {}

    def rehearse(self) -> None:
        """Run every size once, before any is captured. Collective: every rank of the stage, if step is."""
        for size in self._sizes:
            self._run(size)

    def capture(self, pool: object) -> None:
        """Collective, as rehearse()."""
        self._captured = _capture_all(self._run, self._sizes, pool)

    def _run(self, size: int) -> Output:
        return self._step(self._slots[:size])

    def replay(self, slots: Sequence[int]) -> Output:
        """Run the step on these slots. The output's first len(slots) rows are theirs."""
        self._load(list(slots))
        captured = self._captured[self._sizes[bisect_left(self._sizes, len(slots))]]
        captured.graph.replay()
        return captured.output

    def _load(self, slots: list[int]) -> None:
        """Steady decode runs the same slots again: then nothing is copied."""
        if slots == self._loaded:
            return
        rest = [self._padding_slot] * max(0, len(self._loaded) - len(slots))
        self._slots[: len(slots) + len(rest)] = to_device(slots + rest, torch.int64, self._slots.device)
        self._loaded = slots


class PromptGraphs(Generic[Output]):
    """step(slots, cu_seqlens, num_tokens) runs some tokens of a few rows: short prompts and verifications,
    where launching every kernel by itself would take longer than running it. The last row is padding and
    takes what is left.
    """

    def __init__(
        self,
        step: Callable[[torch.Tensor, torch.Tensor, int], Output],
        shape: PromptShape,
        padding_slot: int,
        device: torch.device,
    ) -> None:
        self._shape = shape
        # Kernels are compiled for addresses that are multiples of 16 and for others: as in steps that are not
        # captured, cu_seqlens is at one.
        num_slots = shape.num_rows + 1
        self._gap = [0] * (-num_slots % 4)
        lengths = [num_slots, len(self._gap), shape.num_rows + 2]
        self._inputs = torch.zeros(sum(lengths), dtype=torch.int32, device=device)
        slots, _, cu_seqlens = self._inputs.split(lengths)
        self._padding_slot = padding_slot
        self._run = partial(step, slots, cu_seqlens)
        self._captured: dict[int, _Captured[Output]] = {}

    def rehearse(self) -> None:
        """As DecodeGraphs.rehearse(); the longest too, since some kernels are for long prompts alone."""
        for size in (*self._shape.sizes, self._shape.longest):
            self._load((), (0,), size)  # padding alone
            self._run(size)

    def capture(self, pool: object) -> None:
        """Collective, as rehearse()."""
        self._captured = _capture_all(self._run, self._shape.sizes, pool)

    def fits(self, num_rows: int, num_tokens: int, row_len: int) -> bool:
        """row_len: tokens of the longest row."""
        shape = self._shape
        if num_rows > shape.num_rows or not shape.sizes or num_tokens > shape.sizes[-1]:
            return False
        return shape.row_len == 0 or row_len <= shape.row_len

    def replay(self, slots: Sequence[int], cu_seqlens: Sequence[int]) -> Output:
        """Run rows that fit; cu_seqlens[-1] tokens in all. The output's first rows and tokens are theirs."""
        size = self._shape.sizes[bisect_left(self._shape.sizes, cu_seqlens[-1])]
        self._load(slots, cu_seqlens, size)
        captured = self._captured[size]
        captured.graph.replay()
        return captured.output

    def _load(self, slots: Sequence[int], cu_seqlens: Sequence[int], size: int) -> None:
        idle = self._shape.num_rows + 1 - len(slots)
        ends = [*cu_seqlens, *[cu_seqlens[-1]] * (idle - 1), size]
        filled = [*slots, *[self._padding_slot] * idle, *self._gap]
        self._inputs.copy_(to_device(filled + ends, torch.int32, self._inputs.device))
