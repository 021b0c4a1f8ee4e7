"""What threads add to the contract: one failure is everybody's, and calls that do not match are named."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from distllm.comm.local import LocalControl, run_ranks
from distllm.errors import CommError, CommTimeout


def test_results_in_rank_order() -> None:
    assert run_ranks(5, lambda control: control.rank * 10) == [0, 10, 20, 30, 40]


def test_first_error_ends_the_waits_of_the_others() -> None:
    seen: list[str] = []

    def run(control: LocalControl) -> None:
        comm = control.split(0, control.rank)
        if control.rank == 1:
            raise ValueError("broken rank")
        try:
            comm.recv(torch.empty(1), 1) if control.rank == 0 else control.bcast(None, idle=True)
        except CommError as error:
            seen.append(str(error))
            raise

    start = time.monotonic()
    with pytest.raises(ValueError, match="broken rank"):
        run_ranks(3, run, timeout_s=30)
    assert time.monotonic() - start < 5
    assert len(seen) == 2 and all("ValueError('broken rank')" in text for text in seen)


def test_a_rank_that_never_comes_is_a_timeout() -> None:
    with pytest.raises(CommTimeout, match=r"barrier: .* 0.2 s"):
        run_ranks(2, lambda control: control.barrier() if control.rank else time.sleep(0.5), timeout_s=0.2)


def test_different_collectives_are_named() -> None:
    def run(control: LocalControl) -> None:
        control.barrier() if control.rank else control.bcast(np.zeros(1, dtype=np.int32))

    with pytest.raises(CommError, match=r"different collectives: \['bcast', 'barrier'\]"):
        run_ranks(2, run)


def test_different_shapes_are_named() -> None:
    with pytest.raises(CommError, match=r"all_reduce of \[1\] torch.float32.*all_reduce of \[2\]"):
        run_ranks(2, lambda control: control.split(0, 0).all_reduce(torch.ones(control.rank + 1)))


def test_abort_is_an_exit_for_the_job() -> None:
    with pytest.raises(SystemExit) as exit_info:
        LocalControl().abort(3)
    assert exit_info.value.code == 3
    with pytest.raises(CommError, match="rank 1 aborted the job with code 3"):
        run_ranks(2, lambda control: control.abort(3) if control.rank else control.barrier())


def test_a_sent_tensor_may_be_written_again() -> None:
    def run(control: LocalControl) -> float:
        comm = control.split(0, control.rank)
        x = torch.zeros(3)
        if control.rank == 0:
            comm.send(x, 1)
            x.fill_(9)
        control.barrier()
        return 0.0 if control.rank == 0 else comm.recv(torch.ones(3), 0).sum().item()

    assert run_ranks(2, run) == [0.0, 0.0]
