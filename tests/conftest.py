"""What every test gets: one thread per process, for ranks are many and cores few; a random checkpoint."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before anything imports torch; inherited by every rank that a test starts
)

from pathlib import Path

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Where there is no GPU, every test that is marked gpu is skipped and says so."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama folder without a tokenizer, to be read only: 5 layers, 8 heads, 2 KV heads, vocabulary 131."""
    from tests.checkpoints import make_llama

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_llama(folder)
    return folder
