"""An engine folder as a WeightSource: the slots are put together again from the shards of its ranks.

So an engine loads under any layout: the loader asks for slices, and does not know how they were stored.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from distllm.engine.dtypes import checksum, torch_dtype
from distllm.engine.files import inside
from distllm.engine.format import StoredTensor, rank_file, read_index
from distllm.errors import CheckpointError
from distllm.models.shards import shard_table
from distllm.parallel.sharding import Piece


@dataclass(frozen=True)
class Stored:
    """One piece of a slot, and the stored tensor that it is part of."""

    rank: int
    place: int  # of the tensor in its file
    name: str
    piece: Piece


class EngineDirectory:
    """Checks every file's size when opened, and each tensor's checksum before its first use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = read_index(path)
        self.spec = self.index.spec
        self._dtype = torch_dtype(self.index.dtype)
        self._stored = self._pieces_by_slot()
        self._files = [self._map(rank) for rank in range(len(self.index.ranks))]
        self._verified: set[tuple[int, str]] = set()

    def read(self, slot: str, dim: int, start: int, stop: int) -> torch.Tensor:
        parts, at = [], start
        for stored in self._stored[slot]:
            piece = stored.piece
            assert piece.dim == dim, f"{slot} is cut along {piece.dim}, not {dim}"
            if piece.start <= at < min(piece.stop, stop):  # a replica of what was taken fails this
                until = min(piece.stop, stop)
                begin = piece.dst_start + at - piece.start
                parts.append(self._tensor(stored.rank, stored.name).narrow(dim, begin, until - at))
                at = until
        assert at == stop, f"{slot}: nothing stored from {at} on"
        return torch.cat(parts, dim)

    def position(self, slot: str) -> tuple[int, int]:
        first = self._stored[slot][0]
        return first.rank, first.place

    def _pieces_by_slot(self) -> dict[str, list[Stored]]:
        """For each slot its pieces by ascending start, lower ranks first."""
        slots: dict[str, list[Stored]] = {}
        for rank in range(len(self.index.ranks)):
            for place, shard in enumerate(shard_table(self.spec, self.index.layout.at(rank))):
                for piece in shard.pieces:
                    slots.setdefault(piece.slot, []).append(Stored(rank, place, shard.name, piece))
        for pieces in slots.values():
            pieces.sort(key=lambda stored: (stored.piece.start, stored.rank))
        return slots

    def _map(self, rank: int) -> torch.Tensor:
        """The bytes of a rank's file, mapped: nothing is read before it is used."""
        file = inside(self.path, rank_file(rank))
        size = max(self._end(tensor) for tensor in self.index.ranks[rank].values())
        try:
            with file.open("rb") as opened:
                found = os.fstat(opened.fileno()).st_size
            if found != size:
                raise CheckpointError(f"{file} has {found} bytes instead of {size}; build the engine again")
            return torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}") from error

    def _end(self, tensor: StoredTensor) -> int:
        return tensor.offset + tensor.num_bytes(self.index.dtype)

    def _tensor(self, rank: int, name: str) -> torch.Tensor:
        """A stored tensor, verified once."""
        stored = self.index.ranks[rank][name]
        content = self._files[rank][stored.offset : self._end(stored)]
        if (rank, name) not in self._verified:
            file = self.path / rank_file(rank)
            if checksum(content) != stored.checksum:
                raise CheckpointError(f"{file}: {name} does not match its checksum; build the engine again")
            self._verified.add((rank, name))
        return content.view(self._dtype).view(stored.shape)
