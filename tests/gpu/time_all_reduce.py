"""Run by mpirun: microseconds of an all-reduce by size, NCCL beside the peer-memory kernels, in CUDA graphs.

    launch/mpirun.sh -n 2 python tests/gpu/time_all_reduce.py

A measurement, not a test: the table that the thresholds in one_shot.py were read from.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator

import torch

from distllm.comm.connect import open_control
from distllm.comm.devices import select_device
from distllm.comm.nccl import NcclComm
from distllm.comm.one_shot import CAPACITY, PUSH_CAPACITY, Limits

CHAIN, REPLAYS = 32, 15  # all-reduces of a graph, and its timed replays
HIDDEN_SIZES = (4096, 8192)
NUM_ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
MODES = {
    "push": Limits(push=PUSH_CAPACITY, pull=0, two_shot=0),
    "pull": Limits(push=0, pull=CAPACITY, two_shot=0),
    "two-shot": Limits(push=0, pull=0, two_shot=CAPACITY),
}
EPS = 1e-5


def time_us(comm: NcclComm, step: Callable[[], object]) -> float:
    """Median time of one step of a captured chain, started together on all ranks."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CHAIN):
            step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 2)]
    comm.broadcast(torch.zeros(1, device="cuda"), 0)
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in itertools.pairwise(events[1:])]
    return statistics.median(times) * 1000 / CHAIN


def measure(comm: NcclComm, num_rows: int, hidden_size: int) -> Iterator[float]:
    """NCCL, then plain and fused for each mode; nan where a mode does not take the message."""
    x, residual = (torch.randn(num_rows, hidden_size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.ones(hidden_size, device="cuda", dtype=torch.bfloat16)
    one_shot, comm.one_shot = comm.one_shot, None
    yield time_us(comm, lambda: comm.all_reduce(x))
    comm.one_shot = one_shot
    assert one_shot is not None
    for limits in MODES.values():
        one_shot._limits = limits
        plain, fused = one_shot.takes(x), one_shot.takes_rows(x)
        yield time_us(comm, lambda: one_shot.all_reduce(x)) if plain else float("nan")
        yield (
            time_us(comm, lambda: one_shot.all_reduce_add_norm(x, residual, weight, EPS))
            if fused
            else float("nan")
        )


def main() -> None:
    control = open_control()
    select_device(control)
    comm = NcclComm(control.split(0, control.rank, "tp"), "tp", 60, peer_memory=True)
    lines = []
    for hidden_size in HIDDEN_SIZES:
        for num_rows in NUM_ROWS:
            if num_rows * hidden_size * 2 <= CAPACITY:
                times = " ".join(f"{time:8.2f}" for time in measure(comm, num_rows, hidden_size))
                lines.append(f"{hidden_size:6} {num_rows:5} {num_rows * hidden_size // 512:6} {times}")
    if control.rank == 0:
        titles = " ".join(f"{mode:>8} {'+norm':>8}" for mode in MODES)
        print(f"all-reduce of {comm.size} ranks on {torch.cuda.get_device_name()}, µs, bf16, in graphs")
        print(f"hidden  rows    KiB {'NCCL':>8} {titles}", *lines, sep="\n", flush=True)
    comm.close()
    control.close()


main()
