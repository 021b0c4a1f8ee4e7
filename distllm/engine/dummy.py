"""Weights made up, for benchmarks: a folder with config.json alone is enough. Reads no weights.

A slot's values depend on its name, the model's dtype and the kind of device, not on the layout: every tp × pp
holds slices of the same model.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from distllm.engine.dtypes import torch_dtype
from distllm.engine.resolve import read_spec
from distllm.engine.source import Block, region_at
from distllm.models.shards import slot_shapes
from distllm.parallel.sharding import TensorShard

STD = 0.02  # what models are initialised with: activations stay finite in any dtype


class DummySource:
    """A model folder of which only config.json (or engine.json) is read, as a WeightSource."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec = read_spec(path)
        self._shapes = slot_shapes(self.spec)

    def read(self, shards: Sequence[TensorShard], device: torch.device) -> Iterator[Block]:
        """Normal, norm gains 1. Each slot is made whole and cut: the largest must fit beside the weights."""
        dtype = torch_dtype(self.spec.dtype)
        for shard in shards:
            for piece in shard.pieces:
                whole = _make_slot(piece.slot, self._shapes[piece.slot], dtype, device)
                values = whole.narrow(piece.dim, piece.start, piece.stop - piece.start)
                yield Block(shard.name, region_at(piece.origin(values.dim()), values), values)


def _make_slot(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    slot = torch.empty(shape, dtype=dtype, device=device)
    if name.endswith("norm.weight"):
        return slot.fill_(1.0)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return slot.normal_(0.0, STD, generator=generator)
