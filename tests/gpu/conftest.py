"""World sizes for the tests of this folder, as many as there are GPUs."""

from __future__ import annotations

import pytest


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


@pytest.fixture(params=[1, 2, 4])
def num_ranks(request: pytest.FixtureRequest) -> int:
    """A world size, skipped where there are fewer GPUs."""
    wanted: int = request.param
    if wanted > num_gpus():
        pytest.skip(f"{wanted} ranks need {wanted} GPUs; there are {num_gpus()}")
    return wanted
