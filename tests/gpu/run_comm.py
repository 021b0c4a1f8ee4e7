"""Run by mpirun: the communicator contract over NCCL, and what NCCL adds or promises less.

The contract's checks hold host tensors; `OnGpu` copies them there and back around each call. Left out:
messages of a wrong length, which NCCL cannot notice, and everybody sending to everybody first, which its
sends do not allow.
"""

from __future__ import annotations

import pytest
import torch

from distllm.comm.base import Control, TensorComm
from distllm.comm.connect import open_channels, open_control
from distllm.comm.devices import select_device
from distllm.comm.nccl import NcclComm
from distllm.errors import CommError, CommTimeout
from distllm.parallel.layout import RankLayout
from tests import comm_contract

CHECKS = (
    comm_contract.check_all_reduce,
    comm_contract.check_all_gather,
    comm_contract.check_split,
    comm_contract.check_close,
)
SENDING_CHECKS = (comm_contract.check_interleaved, comm_contract.check_send_closes_late)


class OnGpu:
    """TensorComm for host tensors, over a NcclComm."""

    def __init__(self, comm: NcclComm) -> None:
        self._comm = comm
        self.rank, self.size = comm.rank, comm.size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(self._comm.all_reduce(x.cuda()))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._comm.all_gather(x.cuda()).cpu()

    def send(self, x: torch.Tensor, dst: int) -> None:
        self._comm.send(x.cuda(), dst)

    def recv(self, x: torch.Tensor, src: int) -> torch.Tensor:
        return x.copy_(self._comm.recv(x.cuda(), src))

    def close(self) -> None:
        self._comm.close()


class GpuControl:
    """Control whose split gives communicators between GPUs."""

    def __init__(self, control: Control, peer_memory: bool) -> None:
        self._control, self._peer_memory = control, peer_memory

    def __getattr__(self, name: str) -> object:
        return getattr(self._control, name)

    def split(self, color: int, key: int, name: str = "split") -> TensorComm:
        host = self._control.split(color, key, name)
        comm = NcclComm(host, name, 30, peer_memory=self._peer_memory)
        comm.connect_pairs()
        return OnGpu(comm)


def check_broadcast(comm: NcclComm) -> None:
    for root in range(comm.size):
        x = torch.full((1000,), comm.rank, device="cuda", dtype=torch.int32)
        assert comm.broadcast(x, root).eq(root).all()


def check_grouped(comm: NcclComm) -> None:
    """Everybody sends to everybody, itself too, in any order."""
    mine = torch.full((100_000,), float(comm.rank), device="cuda")
    theirs = [torch.empty_like(mine) for _ in range(comm.size)]
    with comm.grouped():
        for peer in range(comm.size):
            comm.send(mine, peer)
            comm.recv(theirs[peer], peer)
    assert [x.unique().tolist() for x in theirs] == [[float(peer)] for peer in range(comm.size)]


def check_graph(comm: NcclComm) -> None:
    """A captured all_reduce and all_gather, replayed with changing data."""
    x = torch.zeros(3_000_001, device="cuda", dtype=torch.int32)
    comm.all_gather(comm.all_reduce(x))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gathered = comm.all_gather(comm.all_reduce(x))
    for step in range(20):
        x.fill_(comm.rank + step)
        graph.replay()
        assert gathered.eq(sum(range(comm.size)) + step * comm.size).all()


def check_closed(control: Control) -> None:
    comm = NcclComm(control.split(0, control.rank, "short"), "short", 30, peer_memory=False)
    comm.check()
    comm.close()
    comm.close()
    with pytest.raises(CommError, match="all_reduce on the closed communicator short"):
        comm.all_reduce(torch.ones(1, device="cuda"))


def check_deadline(control: Control) -> None:
    """A rank that never comes is named by a CommTimeout, not by silence."""
    comm = NcclComm(control.split(0, control.rank, "late"), "late", 30, peer_memory=False)
    comm.connect_pairs()
    if control.rank == 0:
        comm._timeout_s = 0.5
        with pytest.raises(CommTimeout, match=r"close on late \(rank 0 of \d, .*\): .* 0.5 s"):
            comm.recv(torch.empty(4, device="cuda"), 1)
            comm.close()
    control.barrier()
    comm.abort()


def check_channels(control: Control, device: torch.device) -> None:
    """tp between GPUs, and communicators of one rank that do nothing."""
    channels = open_channels(control, RankLayout(tp_size=control.size, rank=control.rank), device)
    x = torch.ones(8, device=device, dtype=torch.bfloat16)
    assert channels.tp.all_reduce(x).eq(control.size).all()
    assert channels.pipe.all_gather(x).shape == (1, 8)
    channels.close()


def main() -> None:
    control = open_control()
    device = select_device(control)
    # One rank would send to itself, which NCCL takes inside of groups only.
    for check in (*CHECKS, *(SENDING_CHECKS if control.size > 1 else ())):
        check(GpuControl(control, peer_memory=True))  # type: ignore[arg-type]
    comm_contract.check_all_reduce(GpuControl(control, peer_memory=False))  # type: ignore[arg-type]
    comm = NcclComm(control.split(0, control.rank, "tp"), "tp", 30, peer_memory=False)
    for check_nccl in (check_broadcast, check_grouped, check_graph):
        check_nccl(comm)
    comm.close()
    check_closed(control)
    check_channels(control, device)
    if control.size > 1:
        check_deadline(control)
    print(f"rank {control.rank} passed", flush=True)
    control.close()


main()
