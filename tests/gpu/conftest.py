"""Where there is no GPU, every test of this folder is skipped and says so."""

from __future__ import annotations

import pytest


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def needs_gpus(wanted: int) -> None:
    """Skip the test where there are fewer."""
    if wanted > num_gpus():
        pytest.skip(f"{wanted} ranks need {wanted} GPUs; there are {num_gpus()}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and num_gpus() == 0:
        pytest.skip("no CUDA device")


@pytest.fixture(params=[1, 2, 4])
def num_ranks(request: pytest.FixtureRequest) -> int:
    """A world size, skipped where there are fewer GPUs."""
    wanted: int = request.param
    needs_gpus(wanted)
    return wanted
