"""The communicator contract over threads, and the rank that is alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from distllm.comm.base import Control
from distllm.comm.local import LocalControl, run_ranks
from tests.comm_contract import CHECKS


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_threads(check: Callable[[Control], None], num_ranks: int) -> None:
    run_ranks(num_ranks, check, timeout_s=30)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_one_rank(check: Callable[[Control], None]) -> None:
    check(LocalControl())
