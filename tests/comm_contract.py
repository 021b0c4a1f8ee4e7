"""What every communicator must do, whatever carries the bytes: checks that all its ranks run together.

Inputs follow from the rank, so that each rank can compute what the others hold. Sums are compared with numpy
in fp64. A failed assertion on one rank ends the others through the failure rules, tested elsewhere.
"""

from __future__ import annotations

import hashlib
import time

import numpy as np
import pytest
import torch

from distllm.comm.base import Control, TensorComm
from distllm.errors import CommError

SHAPES = ((), (0,), (1,), (7,), (3, 5), (0, 4), (2, 3, 257), (1013,), (64, 1024))
ULPS = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + rank)
    if dtype.is_floating_point:
        return (torch.randn(shape, generator=generator) * 3).to(dtype)
    return torch.randint(-1000, 1000, shape, generator=generator, dtype=dtype)


def check_all_reduce(control: Control) -> None:
    comm = control.split(0, control.rank)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64):
        for shape in SHAPES:
            x = values(comm.rank, shape, dtype)
            assert comm.all_reduce(x) is x
            check_sum(x, [values(rank, shape, dtype) for rank in range(comm.size)])
            digests = control.all_gather_bytes(hashlib.sha256(bytes_of(x)).digest())
            assert len(set(digests)) == 1, f"ranks disagree on the bits of {shape} {dtype}"
    comm.close()


def check_sum(x: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """x is the sum of parts: exactly for integers, within rounding for floats (16 bits round once)."""
    exact = np.sum([part.double().numpy() for part in parts], axis=0)
    error = np.abs(x.double().numpy() - exact)
    if not x.is_floating_point():
        assert not error.any()
        return
    fp32 = len(parts) * 2**-23 * np.sum([part.double().abs().numpy() for part in parts], axis=0)
    assert np.all(error <= fp32 + ULPS[x.dtype] / 2 * 1.001 * np.abs(exact) + 1e-30)


def check_all_gather(control: Control) -> None:
    comm = control.split(0, control.rank)
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool):
        for shape in SHAPES:
            x = values(comm.rank, shape, torch.int32).to(dtype)
            gathered = comm.all_gather(x)
            assert gathered.shape == (comm.size, *shape) and gathered.dtype == dtype
            for rank in range(comm.size):
                assert torch.equal(gathered[rank], values(rank, shape, torch.int32).to(dtype))
            assert torch.equal(x, values(comm.rank, shape, torch.int32).to(dtype)), "the input changed"
    comm.close()


def check_sends_before_recvs(control: Control) -> None:
    """Everybody sends large messages to everybody else before anybody receives: a send must not wait."""
    comm = control.split(0, control.rank)
    peers = [rank for rank in range(comm.size) if rank != comm.rank]
    for number in range(4):
        for peer in peers:
            comm.send(torch.full((300_001,), comm.rank * 100 + number), peer)
    for peer in peers:
        for number in range(4):
            x = comm.recv(torch.empty(300_001, dtype=torch.int64), peer)
            assert x.eq(peer * 100 + number).all(), "messages of a pair arrive in order"
    comm.close()


def check_send_closes_late(control: Control) -> None:
    """close() waits for sends that nobody waited for, and the tensor may be forgotten meanwhile."""
    comm = control.split(0, control.rank)
    if comm.rank == 0:
        for peer in range(1, comm.size):
            comm.send(torch.full((500_000,), peer), peer)
    else:
        time.sleep(0.02)
        assert comm.recv(torch.empty(500_000, dtype=torch.int64), 0).eq(comm.rank).all()
    comm.close()


def check_interleaved(control: Control) -> None:
    """Two communicators of the same ranks are two conversations: a message of one never enters the other."""
    pipe, tokens = (control.split(0, control.rank, name) for name in ("pipe", "tokens"))
    first, last = 0, pipe.size - 1
    for step in range(3):
        if pipe.rank == first:
            pipe.send(torch.full((200_003,), step), last)
        if pipe.rank == last:
            tokens.send(torch.full((5,), -step), first)
            assert pipe.recv(torch.empty(200_003, dtype=torch.int64), first).eq(step).all()
        if pipe.rank == first:
            assert tokens.recv(torch.empty(5, dtype=torch.int64), last).eq(-step).all()
        assert tokens.all_reduce(torch.ones(3)).eq(pipe.size).all()
    tokens.close()
    pipe.close()


def check_split(control: Control) -> None:
    """Colors separate, keys order: here odd and even ranks, in reverse."""
    comm = control.split(control.rank % 2, -control.rank)
    members = sorted(range(control.rank % 2, control.size, 2), reverse=True)
    assert (comm.rank, comm.size) == (members.index(control.rank), len(members))
    assert comm.all_gather(torch.tensor(control.rank)).tolist() == members
    comm.close()


def check_recv_too_small(control: Control) -> None:
    comm = control.split(0, control.rank)
    if comm.size > 1 and comm.rank == 0:
        comm.send(torch.ones(10), 1)
    if comm.rank == 1:
        with pytest.raises(CommError, match="recv"):
            comm.recv(torch.empty(3), 0)
    comm.close()


def check_bcast(control: Control) -> None:
    for length in (0, 1, 254, 255, 256, 257, 1000, 100_003):
        for idle in (False, True):
            plan = np.arange(length, dtype=np.int32) * 3 - length
            received = control.bcast(plan if control.rank == 0 else None, idle=idle)
            assert received.dtype == np.int32 and np.array_equal(received, plan)


def check_bcast_runs_ahead(control: Control) -> None:
    """The root may be many plans ahead; the others still get them all, in order."""
    if control.rank > 0:
        time.sleep(0.05)
    for step in range(50):
        plan = np.full(step, step, dtype=np.int32) if control.rank == 0 else None
        assert np.array_equal(control.bcast(plan), np.full(step, step))


def check_all_gather_bytes(control: Control) -> None:
    for shift in range(3):
        lengths = [(rank + shift) % 3 * 1001 for rank in range(control.size)]
        gathered = control.all_gather_bytes(bytes([control.rank]) * lengths[control.rank])
        assert gathered == [bytes([rank]) * length for rank, length in enumerate(lengths)]


def check_barrier(control: Control) -> None:
    for late in range(control.size):
        if control.rank == late:
            time.sleep(0.01)
        came = time.monotonic()  # one clock for all ranks of a host
        control.barrier()
        left = time.monotonic()
        times = [np.frombuffer(text) for text in control.all_gather_bytes(np.array([came, left]).tobytes())]
        assert max(time[0] for time in times) <= min(time[1] for time in times)


def check_place(control: Control) -> None:
    assert 0 <= control.rank < control.size and 0 <= control.local_rank < control.local_size
    hosts = [text.decode() for text in control.all_gather_bytes(control.host.encode())]
    assert hosts.count(control.host) == control.local_size
    places = control.all_gather_bytes(f"{control.host} {control.local_rank}".encode())
    assert len(set(places)) == control.size


def check_close(control: Control) -> None:
    comm: TensorComm = control.split(0, control.rank)
    comm.all_reduce(torch.ones(2))
    comm.close()
    comm.close()


CHECKS = (
    check_place,
    check_bcast,
    check_bcast_runs_ahead,
    check_all_gather_bytes,
    check_barrier,
    check_split,
    check_all_reduce,
    check_all_gather,
    check_sends_before_recvs,
    check_send_closes_late,
    check_interleaved,
    check_recv_too_small,
    check_close,
)


def bytes_of(x: torch.Tensor) -> bytes:
    return x.reshape(-1).view(torch.uint8).numpy().tobytes()
