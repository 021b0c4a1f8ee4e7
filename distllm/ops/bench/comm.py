"""`bench comm`: all_reduce and send/recv over all ranks of the job as one tensor-parallel group, by size.

Every rank calls it with the same sizes. Bandwidths as in nccl-tests: bytes over time, and for all_reduce also
the bus bandwidth, 2 (n − 1) / n of it, which compares with the links' own figure.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distllm.comm.base import Control, TensorComm
from distllm.comm.connect import open_channels
from distllm.comm.devices import select_device
from distllm.errors import LaunchError
from distllm.ops.bench.timing import Summary, time_calls
from distllm.parallel.layout import RankLayout

MIN_BYTES = 2**10
SIZE_STEP = 4


@dataclass(frozen=True)
class CommResult:
    operation: str
    num_bytes: int
    time_s: Summary  # of one call; for send/recv half a round trip
    bytes_per_s: float
    bus_bytes_per_s: float


def message_sizes(max_bytes: int) -> list[int]:
    """From 1 KiB in steps of four; the largest as given."""
    sizes = [max_bytes]
    while sizes[0] // SIZE_STEP >= MIN_BYTES:
        sizes.insert(0, sizes[0] // SIZE_STEP)
    return sizes


def run_comm(control: Control, max_bytes: int) -> list[CommResult]:
    """Collective: every rank of control. Ranks other than 0 get times of their own, to be ignored."""
    if control.size < 2:
        raise LaunchError("bench comm needs two ranks or more, 1 was started; start it with mpirun -n 2 …")
    layout = RankLayout(tp_size=control.size, rank=control.rank)
    device = select_device(control)
    channels = open_channels(control, layout, device)
    results = []
    for operation in (_all_reduce, _send_recv):
        for num_bytes in message_sizes(max_bytes):
            x = torch.zeros(num_bytes // 4, device=device)  # fp32
            results.append(operation(channels.tp, x))
            control.barrier()
    channels.close()
    return results


def _all_reduce(tp: TensorComm, x: torch.Tensor) -> CommResult:
    time = time_calls([lambda: tp.all_reduce(x)], x.device)
    rate = x.nbytes / time.median
    return CommResult("all_reduce", x.nbytes, time, rate, rate * 2 * (tp.size - 1) / tp.size)


def _send_recv(tp: TensorComm, x: torch.Tensor) -> CommResult:
    """A message from rank 0 to rank 1 and back; the other ranks look on."""
    answer = torch.zeros_like(x)

    def round_trip() -> None:
        if tp.rank == 0:
            tp.send(x, 1)
            tp.recv(answer, 1)
        elif tp.rank == 1:
            tp.recv(answer, 0)
            tp.send(x, 0)

    time = time_calls([round_trip], x.device).scaled(0.5)
    return CommResult("send_recv", x.nbytes, time, x.nbytes / time.median, x.nbytes / time.median)
