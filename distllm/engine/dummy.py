"""Weights made up, for benchmarks: a folder with config.json alone is enough. Reads no weights.

A slot's values depend on its name, the dtype and the kind of device, not on the layout: every tp × pp holds
slices of the same model.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from distllm.engine.dtypes import torch_dtype
from distllm.engine.load import Progress, num_bytes
from distllm.engine.resolve import read_spec
from distllm.engine.source import WeightSource
from distllm.models.shards import slot_shapes
from distllm.parallel.sharding import TensorShard

STD = 0.02  # what models are initialised with: activations stay finite in any dtype


class DummySource:
    """A model folder of which only config.json (or engine.json) is read, as a WeightSource."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec = read_spec(path)
        self._shapes = slot_shapes(self.spec)
        self._order = {slot: place for place, slot in enumerate(self._shapes)}

    def read(self, slot: str, dim: int, start: int, stop: int) -> torch.Tensor:
        whole = _make_slot(slot, self._shapes[slot], torch_dtype(self.spec.dtype), torch.device("cpu"))
        return whole.narrow(dim, start, stop - start)

    def position(self, slot: str) -> tuple[int, int]:
        return 0, self._order[slot]


def dummy_weights(
    source: WeightSource,
    shards: Sequence[TensorShard],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """In place of load_weights: the shards as random tensors, made on this device. Padding is zero.

    Normal, norm gains 1. Each slot is made whole and cut, so the largest must fit beside the weights.
    """
    shapes = slot_shapes(source.spec)
    weights = {shard.name: torch.zeros(shard.shape, dtype=dtype, device=device) for shard in shards}
    total, done = sum(num_bytes(shard, dtype) for shard in shards), 0
    for shard in shards:
        for piece in shard.pieces:
            size = piece.stop - piece.start
            values = _make_slot(piece.slot, shapes[piece.slot], dtype, device)
            place = weights[shard.name].narrow(piece.dim, piece.dst_start, size)
            place.copy_(values.narrow(piece.dim, piece.start, size))
            done += place.nbytes
            if progress:
                progress(done, total)
    return weights


def _make_slot(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    slot = torch.empty(shape, dtype=dtype, device=device)
    if name.endswith("norm.weight"):
        return slot.fill_(1.0)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return slot.normal_(0.0, STD, generator=generator)
