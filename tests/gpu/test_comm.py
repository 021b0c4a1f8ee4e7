"""Communicators between GPUs, at every world size that they allow, and a launch that binds them wrongly."""

from __future__ import annotations

import pytest

from tests import launchers

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("script", ["run_comm.py", "run_one_shot.py"])
def test_on_ranks(script: str, num_ranks: int) -> None:
    code, output = launchers.launcher("openmpi").run(num_ranks, f"tests/gpu/{script}", timeout_s=110)
    assert code == 0, output
    assert sum(f"rank {rank} passed" in output for rank in range(num_ranks)) == num_ranks, output


def test_two_ranks_on_one_gpu_end_with_the_map() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0"}
    code, output = launchers.launcher("openmpi").run(2, "tests/gpu/run_comm.py", **environ)
    assert code == 2, output
    assert output.count("distllm: error: ranks [0, 1] share a GPU") == 1 and "Traceback" not in output
    assert "rank 0" in output and "rank 1" in output and "cuda:0" in output
