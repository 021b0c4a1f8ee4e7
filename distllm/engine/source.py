"""Where weights come from: one protocol over a Hugging Face folder, an engine folder and made-up weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from distllm.models.spec import DecoderSpec
from distllm.parallel.sharding import TensorShard


@dataclass(frozen=True)
class Block:
    """Values of a part of a shard, in the stored dtype: shard[region], a stack seen as one matrix
    (TensorShard.flat_shape).
    """

    shard: str
    region: tuple[slice, ...]
    values: torch.Tensor


def region_at(start: tuple[int, ...], values: torch.Tensor) -> tuple[slice, ...]:
    """Of a block of these values that begins there."""
    return tuple(slice(first, first + size) for first, size in zip(start, values.shape, strict=True))


class WeightSource(Protocol):
    """The weights of one model. Opening it has checked that all are there and fit."""

    path: Path
    spec: DecoderSpec

    def read(self, shards: Sequence[TensorShard], device: torch.device) -> Iterator[Block]:
        """What fills these shards, block by block, on the device, in the order that is fastest to read.

        Padding is in no block, or zero. A block's values are valid until the next is asked for, on a GPU for
        work on the current stream. Raises CheckpointError if stored bytes are damaged, at the latest after
        the last block.
        """
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
