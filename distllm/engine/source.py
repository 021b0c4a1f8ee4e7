"""Where weights come from: one protocol over a Hugging Face folder and an engine folder."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from distllm.models.spec import DecoderSpec


class WeightSource(Protocol):
    """The slots of one model, whole or in slices. Opening it has checked that all are there and fit."""

    path: Path
    spec: DecoderSpec

    def read(self, slot: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """slot[start:stop] along dim, on the CPU in the stored dtype. Reads from disk only what is asked for.

        Raises CheckpointError if the stored bytes are damaged.
        """
        ...

    def position(self, slot: str) -> tuple[int, int]:
        """Sort key that puts slots into the order in which they lie on disk."""
        ...


def open_source(path: Path, load_format: str = "auto") -> WeightSource:
    """The weights of a model folder; "dummy" makes them up. Raises CheckpointError if anything is missing or
    unfit.
    """
    from distllm.engine.checkpoint import HFCheckpoint
    from distllm.engine.directory import EngineDirectory
    from distllm.engine.dummy import DummySource
    from distllm.engine.resolve import is_engine

    if load_format == "dummy":
        return DummySource(path)
    return EngineDirectory(path) if is_engine(path) else HFCheckpoint(path)
