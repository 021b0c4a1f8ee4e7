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
from distllm.engine.reader import Span, read_ahead
from distllm.engine.source import Block
from distllm.errors import CheckpointError


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
    """tensor[start:stop] along dim, which a shard holds from dst_start on. The other dimension is whole."""

    tensor: DiskTensor
    shard: str
    dim: int
    start: int
    stop: int
    dst_start: int


@dataclass(frozen=True)
class _Chunk:
    """Rows [start, stop) of a tensor: one read."""

    tensor: DiskTensor
    start: int
    stop: int
    extents: Sequence[Extent]  # of the whole tensor

    def span(self) -> Span:
        tensor, rows = self.tensor, self.stop - self.start
        offset = tensor.offset + self.start * tensor.row_bytes
        return Span(tensor.file, offset, rows * tensor.row_bytes, tensor.checksum is not None)

    def blocks(self, content: torch.Tensor) -> Iterator[Block]:
        values = content.view(self.tensor.dtype).view(-1, *self.tensor.shape[1:])
        for extent in self.extents:
            if extent.dim == 1:
                columns = slice(extent.dst_start, extent.dst_start + extent.stop - extent.start)
                cut = values[:, extent.start : extent.stop]
                yield Block(extent.shard, (slice(self.start, self.stop), columns), cut)
                continue
            start, stop = max(extent.start, self.start), min(extent.stop, self.stop)
            if start < stop:
                shift = extent.dst_start - extent.start
                cut = values[start - self.start : stop - self.start]
                yield Block(extent.shard, (slice(start + shift, stop + shift),), cut)


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
        if extent.start < extent.stop:
            of_tensor.setdefault(extent.tensor, []).append(extent)
    for tensor in sorted(of_tensor, key=lambda tensor: (tensor.file, tensor.offset)):
        wanted = of_tensor[tensor]
        start, stop = _rows(tensor, wanted)
        step = max(1, reader.CHUNK_BYTES // tensor.row_bytes)
        for row in range(start, stop, step):
            yield _Chunk(tensor, row, min(row + step, stop), wanted)


def _rows(tensor: DiskTensor, extents: Sequence[Extent]) -> tuple[int, int]:
    """[start, stop) of the rows that must be read."""
    if tensor.checksum is not None or any(extent.dim == 1 for extent in extents):
        return 0, tensor.shape[0]
    return min(extent.start for extent in extents), max(extent.stop for extent in extents)


def _check(tensor: DiskTensor, crc: int) -> None:
    if as_hex(crc) != tensor.checksum:
        raise CheckpointError(
            f"{tensor.file}: {tensor.name} does not match its checksum; build the engine again"
        )
