"""World sizes for the tests of this folder, as many as there are GPUs."""

from __future__ import annotations

import pytest


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def needs_gpus(wanted: int) -> None:
    """Skip the test where there are fewer."""
    if wanted > num_gpus():
        pytest.skip(f"{wanted} ranks need {wanted} GPUs; there are {num_gpus()}")


@pytest.fixture(params=[1, 2, 4])
def num_ranks(request: pytest.FixtureRequest) -> int:
    """A world size, skipped where there are fewer GPUs."""
    wanted: int = request.param
    needs_gpus(wanted)
    return wanted
