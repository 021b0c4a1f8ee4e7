"""How long device work takes: wall time on a CPU, events around a replayed CUDA graph on a GPU.

The number of calls is fixed by the caller, never by a clock: calls may be collectives, and every rank must
make as many. Also the summary of repeated measurements.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

NUM_WARMUPS = 3
NUM_SAMPLES = 10
CALLS_PER_GRAPH = 16

Call = Callable[[], object]


@dataclass(frozen=True)
class Summary:
    """Repeated measurements of one quantity; raw in the order of the runs."""

    median: float
    p90: float
    p99: float
    lowest: float
    raw: list[float]

    def scaled(self, factor: float) -> Summary:
        return summarize([factor * value for value in self.raw])


def summarize(raw: Sequence[float]) -> Summary:
    p90, p99 = (float(value) for value in np.percentile(raw, (90, 99)))
    return Summary(statistics.median(raw), p90, p99, min(raw), list(raw))


def time_calls(calls: Sequence[Call], device: torch.device) -> Summary:
    """Seconds of one call, the calls made in turn. Several calls on different memory keep caches cold."""
    for number in range(NUM_WARMUPS):
        calls[number % len(calls)]()
    samples = _graph_samples(calls) if device.type == "cuda" else _wall_samples(calls)
    return summarize(samples)


def _wall_samples(calls: Sequence[Call]) -> list[float]:
    samples = []
    for number in range(NUM_SAMPLES):
        start = time.perf_counter()
        calls[number % len(calls)]()
        samples.append(time.perf_counter() - start)
    return samples


def _graph_samples(calls: Sequence[Call]) -> list[float]:
    """Launches cost the host more than small kernels cost the device; in a graph, as in the engine, they
    cost nothing.
    """
    num_calls = max(CALLS_PER_GRAPH, len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(num_calls):
            calls[number % len(calls)]()
    graph.replay()
    return [_replay_s(graph) / num_calls for _ in range(NUM_SAMPLES)]


def _replay_s(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
