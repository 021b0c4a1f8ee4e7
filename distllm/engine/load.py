"""From a WeightSource to the tensors of one rank. Knows shards; never files, families or other ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from distllm.engine.source import WeightSource
from distllm.errors import CheckpointError
from distllm.parallel.sharding import Piece, TensorShard

Progress = Callable[[int, int], None]  # (bytes done, bytes in all, padding included), called after each piece


def load_weights(
    source: WeightSource,
    shards: Sequence[TensorShard],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """The shards as tensors of this dtype on this device, by name. Padding is zero.

    Reads only the pieces of these shards, in the order in which they lie on disk, so that disks read forward.
    Raises CheckpointError if stored bytes are damaged, or a value does not fit into float16.
    """
    weights = {shard.name: torch.zeros(shard.shape, dtype=dtype, device=device) for shard in shards}
    jobs = [(source.position(piece.slot), piece, shard.name) for shard in shards for piece in shard.pieces]
    jobs.sort(key=lambda job: job[0])
    total = sum(num_bytes(shard, dtype) for shard in shards)
    done = 0
    for _, piece, name in jobs:
        done += _copy_piece(source, piece, weights[name])
        if progress:
            progress(done, total)
    return weights


def _copy_piece(source: WeightSource, piece: Piece, shard: torch.Tensor) -> int:
    """Read one piece and convert it on its way into the shard. Returns its bytes there."""
    values = source.read(piece.slot, piece.dim, piece.start, piece.stop)
    place = shard.narrow(piece.dim, piece.dst_start, piece.stop - piece.start)
    place.copy_(values)
    if place.dtype == torch.float16 and values.dtype != torch.float16 and not place.isfinite().all():
        raise CheckpointError(
            f"{piece.slot} has values beyond float16's range; use --dtype bfloat16 or float32"
        )
    return place.nbytes


def num_bytes(shard: TensorShard, dtype: torch.dtype) -> int:
    return math.prod(shard.shape) * dtype.itemsize
