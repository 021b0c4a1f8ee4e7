"""From rectangles of stored tensors to blocks of shards on the device. Knows rows and columns, not folders.

Whole rows are read, and columns cut on the device: they lie in every page of the file, so that a disk reads
all of it anyway, and one large copy from the host's page cache is cheaper than many small ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distllm.engine import reader
from distllm.engine.checksum import as_hex, joined_crc32
from distllm.engine.reader import read_ahead
from distllm.engine.source import Block, region_at
from distllm.errors import CheckpointError
from distllm.parallel.sharding import Span


@dataclass(frozen=True)
class DiskTensor:
    """A tensor in a file, row-major. With a checksum it is read whole and checked."""

    file: Path
    offset: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    checksum: str | None = None

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class Extent:
    """A rectangle of a stored tensor, and where in a shard it begins: both along the tensor's axes.

    A transposed one is turned on its way, so that the shard's axes are the tensor's the other way round.
    """

    tensor: DiskTensor
    shard: str
    region: tuple[Span, ...]
    dst_start: tuple[int, ...]
    transposed: bool = False


def cut(tensor: DiskTensor, shard: str, dim: int, span: Span, dst_start: int) -> Extent:
    """The span of a tensor along dim, which a shard holds from dst_start on. The other dimension is whole."""
    region = [(0, size) for size in tensor.shape]
    start = [0] * len(region)
    region[dim], start[dim] = span, dst_start
    return Extent(tensor, shard, tuple(region), tuple(start))


@dataclass(frozen=True)
class _Chunk:
    """Rows [start, stop) of a tensor: one read."""

    tensor: DiskTensor
    start: int
    stop: int
    extents: Sequence[Extent]  # of the whole tensor

    def span(self) -> reader.Span:
        tensor, rows = self.tensor, self.stop - self.start
        offset = tensor.offset + self.start * tensor.row_bytes
        return reader.Span(tensor.file, offset, rows * tensor.row_bytes, tensor.checksum is not None)

    def blocks(self, content: torch.Tensor) -> Iterator[Block]:
        values = content.view(self.tensor.dtype).view(-1, *self.tensor.shape[1:])
        for extent in self.extents:
            start, stop = max(extent.region[0][0], self.start), min(extent.region[0][1], self.stop)
            if start < stop:
                rows = (start - self.start, stop - self.start)
                yield _block(extent, values, rows, start - extent.region[0][0])


def _block(extent: Extent, values: torch.Tensor, rows: Span, num_before: int) -> Block:
    """These rows of values, cut to the extent, of which num_before rows came before."""
    part = values[tuple(slice(*span) for span in (rows, *extent.region[1:]))]
    starts = (extent.dst_start[0] + num_before, *extent.dst_start[1:])
    place = region_at(starts, part)
    return Block(extent.shard, place[::-1], part.T) if extent.transposed else Block(extent.shard, place, part)


def read_extents(extents: Sequence[Extent], device: torch.device) -> Iterator[Block]:
    """The blocks of all extents, in the order in which they lie on disk, each tensor read once.

    A checksum is known when a tensor's last block has been given: only at the end are all of them good.
    Raises CheckpointError.
    """
    chunks = list(_chunks(extents))
    contents = read_ahead([chunk.span() for chunk in chunks], device)
    crc = 0
    for chunk, (content, part) in zip(chunks, contents, strict=True):
        if part is not None:
            crc = joined_crc32(crc, part, content.nbytes) if chunk.start else part
            if chunk.stop == chunk.tensor.shape[0]:
                _check(chunk.tensor, crc)
        yield from chunk.blocks(content)


def _chunks(extents: Sequence[Extent]) -> Iterator[_Chunk]:
    of_tensor: dict[DiskTensor, list[Extent]] = {}
    for extent in extents:
        if all(start < stop for start, stop in extent.region):
            of_tensor.setdefault(extent.tensor, []).append(extent)
    for tensor in sorted(of_tensor, key=lambda tensor: (tensor.file, tensor.offset)):
        wanted = of_tensor[tensor]
        step = max(1, reader.CHUNK_BYTES // tensor.row_bytes)
        for start, stop in _rows(tensor, wanted):
            for row in range(start, stop, step):
                yield _Chunk(tensor, row, min(row + step, stop), wanted)


def _rows(tensor: DiskTensor, extents: Sequence[Extent]) -> list[Span]:
    """The rows that must be read, ascending: what extents share or where they meet is one span."""
    if tensor.checksum is not None:
        return [(0, tensor.shape[0])]
    joined: list[Span] = []
    for start, stop in sorted(extent.region[0] for extent in extents):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined


def _check(tensor: DiskTensor, crc: int) -> None:
    if as_hex(crc) != tensor.checksum:
        raise CheckpointError(
            f"{tensor.file}: {tensor.name} does not match its checksum; build the engine again"
        )
