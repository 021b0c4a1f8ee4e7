"""Run by mpirun: the communicator contract over SELF, WORLD, a duplicate, and the halves of a split."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
import torch

from distllm.comm import mpi
from distllm.comm.base import Control
from distllm.comm.connect import open_control
from distllm.errors import CommError, CommTimeout
from tests.comm_contract import CHECKS


def check_timeout(control: Control, comm: object) -> None:
    """A wait ends at its deadline and says what, on which communicator, how long, which rank, which host."""
    impatient = open_control(comm, control.size, timeout_s=0.2)
    pair = impatient.split(0, control.rank, "pair")
    x = torch.empty(4)
    if control.rank == 0:
        start = time.monotonic()
        with pytest.raises(CommTimeout, match=r"recv from rank 1 on pair \(rank 0 of \d, .+\): .* 0.2 s"):
            pair.recv(x, 1)
        assert 0.2 <= time.monotonic() - start < 2
    control.barrier()
    if control.rank == 1:
        pair.send(torch.ones(4), 0)  # what rank 0 still listens for
    control.barrier()
    pair.close()
    impatient.close()


def check_closed(control: Control, comm: object) -> None:
    short = open_control(comm, control.size)
    short.close()
    short.close()
    with pytest.raises(CommError, match="barrier on the closed communicator control"):
        short.barrier()


def check_idle(control: Control) -> None:
    """Ranks without work sleep: one second of waiting costs them about 0.015 s of a processor."""
    control.barrier()
    if control.rank == 0:
        time.sleep(1)
    used = time.process_time()
    control.bcast(np.zeros(3, dtype=np.int32) if control.rank == 0 else None, idle=True)
    assert time.process_time() - used < 0.05


def main() -> None:
    world = mpi.connect()  # starts MPI, late, and by itself; open_control would not, for one rank
    assert world.size == int(sys.argv[1])
    comm_world = mpi._mpi().COMM_WORLD
    half = comm_world.Split(comm_world.rank % 2, -comm_world.rank)
    for comm in (mpi._mpi().COMM_SELF, comm_world, comm_world.Dup(), half):
        control = open_control(comm, comm.size)
        assert (control.rank, control.size) == (comm.rank, comm.size)
        for check in CHECKS:
            check(control)
        if comm.size > 1:
            check_timeout(control, comm)
        check_closed(control, comm)
        control.close()
        assert comm.allreduce(1) == comm.size, "the caller's communicator lives on"
    check_idle(world)
    world.close()
    print(f"rank {world.rank} passed", flush=True)


main()
