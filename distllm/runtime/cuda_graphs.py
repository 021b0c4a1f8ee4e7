"""DecodeGraphs: the decode step as CUDA graphs, one for each batch bucket. Knows a step function; never a plan.

A captured step reads its slots from one static buffer and finds everything else in the slot tables, so a replay
needs no other input. Rows that fill a bucket up belong to a padding slot of their own, whose KV nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from distllm.runtime.staging import to_device

Output = TypeVar("Output")


def batch_buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes that are captured, ascending: close enough that at most 7 rows of a large batch are padding."""
    small = [size for size in (1, 2, 4) if size < max_num_seqs]
    return [*small, *range(8, max_num_seqs, 8), max_num_seqs]


@dataclass(frozen=True)
class _Captured(Generic[Output]):
    graph: torch.cuda.CUDAGraph
    output: Output


class DecodeGraphs(Generic[Output]):
    """step(slots) runs one token of each slot; its output's tensors are overwritten by the next replay."""

    def __init__(
        self,
        step: Callable[[torch.Tensor], Output],
        max_num_seqs: int,
        padding_slot: int,
        device: torch.device,
    ) -> None:
        """Capture every bucket, the largest first, so that the smaller ones fit into its memory.

        Collective: every rank of the stage, if step is.
        """
        self._slots = torch.full((max_num_seqs,), padding_slot, dtype=torch.int64, device=device)
        self._padding_slot = padding_slot
        self._loaded: list[int] = []  # what the buffer holds, padding left out
        self._captured: dict[int, _Captured[Output]] = {}
        pool = torch.cuda.graph_pool_handle()
        self._buckets = batch_buckets(max_num_seqs)
        for size in reversed(self._buckets):
            self._captured[size] = self._capture(step, size, pool)

    def replay(self, slots: Sequence[int]) -> Output:
        """Run the step on these slots. The output's first len(slots) rows are theirs."""
        size = next(size for size in self._buckets if size >= len(slots))
        self._load(list(slots))
        captured = self._captured[size]
        captured.graph.replay()
        return captured.output

    def _capture(self, step: Callable[[torch.Tensor], Output], size: int, pool: object) -> _Captured[Output]:
        slots = self._slots[:size]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and libraries started outside the capture
            step(slots)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):  # type: ignore[arg-type]
            output = step(slots)
        return _Captured(graph, output)

    def _load(self, slots: list[int]) -> None:
        """Steady decode runs the same slots again: then nothing is copied."""
        if slots == self._loaded:
            return
        rest = [self._padding_slot] * max(0, len(self._loaded) - len(slots))
        self._slots[: len(slots) + len(rest)] = to_device(slots + rest, torch.int64, self._slots.device)
        self._loaded = slots
