"""An engine folder as a WeightSource: what was stored for some layout, found again for any other.

A shard that is stored as it is asked for is taken whole, so that under its own layout a rank reads its own
file; others are put together from pieces of the stored ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from distllm.engine.dtypes import torch_dtype
from distllm.engine.extents import DiskTensor, Extent, cut, read_extents
from distllm.engine.files import inside
from distllm.engine.format import EngineIndex, rank_file, read_index
from distllm.engine.source import Block
from distllm.errors import CheckpointError
from distllm.models.shards import shard_table
from distllm.parallel.sharding import Piece, TensorShard


@dataclass(frozen=True)
class Stored:
    """One piece of a slot, and the stored tensor that it is part of."""

    tensor: DiskTensor
    piece: Piece


class EngineDirectory:
    """Checks every file's size when opened, and each tensor's checksum when it is first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = read_index(path)
        self.spec = self.index.spec
        self._shards: dict[TensorShard, DiskTensor] = {}  # the lowest rank's
        self._slots: dict[str, list[Stored]] = {}  # the pieces of each by ascending start
        self._verified: set[DiskTensor] = set()
        for rank in range(len(self.index.ranks)):
            _check_size(inside(path, rank_file(rank)), _end_of_file(self.index, rank))
            self._add_rank(rank)
        for pieces in self._slots.values():
            pieces.sort(key=lambda stored: stored.piece.start)  # stable: lower ranks first

    def read(self, shards: Sequence[TensorShard], device: torch.device) -> Iterator[Block]:
        extents = [extent for shard in shards for extent in self._extents(shard)]
        yield from read_extents(extents, device)
        self._verified |= {extent.tensor for extent in extents}

    def _add_rank(self, rank: int) -> None:
        file, dtype = self.path / rank_file(rank), torch_dtype(self.index.dtype)
        for shard in shard_table(self.spec, self.index.layout.at(rank)):
            stored = self.index.ranks[rank][shard.name]
            tensor = DiskTensor(file, stored.offset, shard.name, shard.flat_shape, dtype, stored.checksum)
            self._shards.setdefault(shard, tensor)
            for piece in shard.pieces:
                self._slots.setdefault(piece.slot, []).append(Stored(tensor, piece))

    def _extents(self, shard: TensorShard) -> Iterator[Extent]:
        if shard in self._shards:
            tensor = self._to_read(self._shards[shard])
            yield cut(tensor, shard.name, 0, (0, tensor.shape[0]), 0)
            return
        for piece in shard.pieces:
            yield from self._parts(shard, piece)

    def _parts(self, shard: TensorShard, piece: Piece) -> Iterator[Extent]:
        """A piece, from stored pieces of the same slot."""
        at = piece.start
        for stored in self._slots[piece.slot]:
            have = stored.piece
            assert have.dim == piece.dim, f"{piece.slot} is cut along {have.dim}, not {piece.dim}"
            if have.start <= at < min(have.stop, piece.stop):  # a replica of what was taken fails this
                until = min(have.stop, piece.stop)
                yield self._extent(stored.tensor, shard, have.part(at, until), piece.part(at, until))
                at = until
        assert at == piece.stop, f"{piece.slot}: nothing stored from {at} on"

    def _extent(self, tensor: DiskTensor, shard: TensorShard, have: Piece, piece: Piece) -> Extent:
        """The same part of a slot, as it is stored and as the shard wants it."""
        shape = have.shape(shard.matrix_shape)
        begin = have.origin(len(shape))
        region = tuple((first, first + length) for first, length in zip(begin, shape, strict=True))
        return Extent(self._to_read(tensor), shard.name, region, piece.origin(len(shape)))

    def _to_read(self, tensor: DiskTensor) -> DiskTensor:
        """Its checksum is computed once."""
        return replace(tensor, checksum=None) if tensor in self._verified else tensor


def _end_of_file(index: EngineIndex, rank: int) -> int:
    return max(tensor.offset + tensor.num_bytes(index.dtype) for tensor in index.ranks[rank].values())


def _check_size(file: Path, size: int) -> None:
    try:
        with file.open("rb"):
            found = file.stat().st_size
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    if found != size:
        raise CheckpointError(f"{file} has {found} bytes instead of {size}; build the engine again")
