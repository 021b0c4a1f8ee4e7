"""From a WeightSource to the tensors of one rank. Knows shards; never files, families or other ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from distllm.engine.source import WeightSource
from distllm.errors import CheckpointError
from distllm.parallel.sharding import TensorShard

Progress = Callable[[int, int], None]  # (bytes done, bytes in all, padding included), as bytes arrive


def load_weights(
    source: WeightSource,
    shards: Sequence[TensorShard],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """The shards as tensors of this dtype on this device, by name. Padding is zero.

    Memory beside them: the source's buffers, and one block on the device, where it is converted. On a GPU
    the last copies may still be under way on the current stream. Raises CheckpointError if stored bytes are
    damaged, or a value does not fit into float16.
    """
    weights = {shard.name: torch.zeros(shard.shape, dtype=dtype, device=device) for shard in shards}
    total, done = sum(num_bytes(shard, dtype) for shard in shards), 0
    finite: list[tuple[str, torch.Tensor]] = []
    flat = {shard.name: weights[shard.name].view(shard.flat_shape) for shard in shards}
    for block in source.read(shards, device):
        place = flat[block.shard][block.region]
        place.copy_(block.values)
        if dtype == torch.float16 and block.values.dtype != torch.float16:
            finite.append((block.shard, place.isfinite().all()))
        done += place.nbytes
        if progress:
            progress(done, total)
    _check_finite(finite)
    return weights


def _check_finite(finite: Sequence[tuple[str, torch.Tensor]]) -> None:
    """finite: for each block its shard and whether it fits, still on the device. One wait for all."""
    fits = torch.stack([flag for _, flag in finite]).tolist() if finite else []
    for (name, _), fit in zip(finite, fits, strict=True):
        if not fit:
            raise CheckpointError(
                f"{name} has values beyond float16's range; use --dtype bfloat16 or float32"
            )


def num_bytes(shard: TensorShard, dtype: torch.dtype) -> int:
    return math.prod(shard.shape) * dtype.itemsize
