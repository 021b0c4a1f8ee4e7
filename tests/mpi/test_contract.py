"""The communicator contract over MPI, at every world size, under both MPIs."""

from __future__ import annotations

import pytest

from tests import launchers


@pytest.mark.mpi
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", launchers.NAMES)
def test_contract(name: str, num_ranks: int) -> None:
    code, output = launchers.launcher(name).run(num_ranks, "tests/mpi/run_contract.py", num_ranks)
    assert code == 0, output
    assert sum(f"rank {rank} passed" in output for rank in range(num_ranks)) == num_ranks, output
