"""Reading rectangles of stored tensors, in chunks by several threads: against NumPy slices of the same bytes;
checksums against zlib; and files that change or fail while they are read.
"""

from __future__ import annotations

import errno
import os
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from distllm.engine import WeightSource, load_weights, open_source, reader
from distllm.engine.checksum import as_hex, joined_crc32
from distllm.engine.extents import DiskTensor, Extent, cut, read_extents
from distllm.errors import CheckpointError
from distllm.models.shards import shard_table
from distllm.parallel.layout import RankLayout

CPU, ALONE = torch.device("cpu"), RankLayout()


@pytest.mark.parametrize("sizes", [(0, 0), (1, 0), (0, 5), (1, 1), (7, 1000), (4096, 8), (3, 2**20 + 1)])
def test_crcs_join_as_if_computed_at_once(sizes: tuple[int, int]) -> None:
    first, second = (random.Random(size).randbytes(size) for size in sizes)
    assert joined_crc32(zlib.crc32(first), zlib.crc32(second), sizes[1]) == zlib.crc32(first + second)


def store(folder: Path, rng: random.Random, *, checked: bool) -> list[tuple[DiskTensor, np.ndarray]]:
    """A few float32 tensors of random shapes in two files, with bytes between them that are nobody's."""
    tensors = []
    for name in ("b", "a"):
        content = b""
        for number in range(4):
            content += rng.randbytes(rng.randrange(9))
            shape = tuple(rng.randint(1, 40) for _ in range(rng.randint(1, 2)))
            values = np.array([rng.random() for _ in range(np.prod(shape))], np.float32).reshape(shape)
            crc = as_hex(zlib.crc32(values.tobytes())) if checked else None
            place = (folder / name, len(content), f"{name}{number}")
            tensors.append((DiskTensor(*place, shape, torch.float32, crc), values))
            content += values.tobytes()
        (folder / name).write_bytes(content)
    return tensors


def any_extent(rng: random.Random, tensor: DiskTensor, shard: str) -> Extent:
    bounds = [sorted(rng.choices(range(size + 1), k=2)) for size in tensor.shape]
    region = tuple((start, stop) for start, stop in bounds)
    turned = len(region) == 2 and rng.random() < 0.5
    return Extent(tensor, shard, region, tuple(rng.randrange(5) for _ in region), turned)


@pytest.mark.parametrize("chunk_bytes", [1, 100, 999, 2**20])
@pytest.mark.parametrize("checked", [False, True])
def test_any_rectangles_against_numpy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, checked: bool
) -> None:
    """Chunks of less than a row, of some rows, of whole tensors; several rectangles of one tensor, some
    turned; empty ones.
    """
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk_bytes)
    rng = random.Random(chunk_bytes)
    stored, extents, wanted, got = store(tmp_path, rng, checked=checked), [], {}, {}
    for number in range(40):
        tensor, values = rng.choice(stored)
        extent = any_extent(rng, tensor, str(number))
        extents.append(extent)
        part = values[tuple(slice(*span) for span in extent.region)]
        padded = np.pad(part, [(start, 0) for start in extent.dst_start])
        wanted[extent.shard] = padded.T if extent.transposed else padded
        got[extent.shard] = torch.zeros(wanted[extent.shard].shape)
    for block in read_extents(extents, CPU):
        got[block.shard][block.region] = block.values
    for shard, values in wanted.items():
        assert np.array_equal(got[shard].numpy(), values), shard


def test_rows_between_those_that_are_wanted_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rectangles that overlap, one that touches them, one apart: two spans."""
    (tmp_path / "f").write_bytes(bytes(4 * 5 * 100))
    tensor = DiskTensor(tmp_path / "f", 0, "t", (100, 5), torch.float32)
    spans = [(40, 60), (0, 10), (7, 20), (20, 21)]
    extents = [cut(tensor, str(span), 0, span, 0) for span in spans]
    seen, real = [], reader.read_ahead
    monkeypatch.setattr(
        "distllm.engine.extents.read_ahead", lambda spans, device: seen.extend(spans) or real(spans, device)
    )
    assert len(list(read_extents(extents, CPU))) == 4
    assert [(span.offset // 20, span.num_bytes // 20) for span in seen] == [(0, 21), (40, 20)]


@pytest.mark.parametrize("flipped", [0, 500, -1])
def test_a_flipped_bit_in_any_chunk_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flipped: int
) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", 64)
    values = np.arange(250, dtype=np.float32).reshape(50, 5)
    tensor = DiskTensor(tmp_path / "f", 0, "t", (50, 5), torch.float32, as_hex(zlib.crc32(values.tobytes())))
    content = bytearray(values.tobytes())
    extent = cut(tensor, "s", 0, (20, 21), 0)  # one row is wanted, all are checked
    (tmp_path / "f").write_bytes(content)
    assert [block.values.tolist() for block in read_extents([extent], CPU)] == [[[100, 101, 102, 103, 104]]]
    content[flipped] ^= 1
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(CheckpointError, match="f: t does not match its checksum"):
        list(read_extents([extent], CPU))


def load(source: WeightSource, layout: RankLayout = ALONE) -> dict[str, torch.Tensor]:
    return load_weights(source, shard_table(source.spec, layout), torch.float32, CPU)


def test_a_file_that_shrinks_after_it_was_opened(copied: Path) -> None:
    """By mmap this would be SIGBUS."""
    source, file = open_source(copied), copied / "model.safetensors"
    os.truncate(file, file.stat().st_size - 5000)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or incomplete: it ends at byte"):
        load(source)


def test_a_disk_that_fails(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(CheckpointError, match=r"cannot read .*model.safetensors: Input/output error"):
        load(open_source(copied))


def test_short_reads_go_on(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from network file systems, and from any above 2 GiB."""
    source, real = open_source(copied), os.preadv
    whole = load(source, RankLayout(2, 1))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:101]], at))
    pieces = load(source, RankLayout(2, 1))
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_buffers_are_few_whatever_the_model(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read lands in one of NUM_THREADS + 2 places; all descriptors are closed again."""
    monkeypatch.setattr(reader, "CHUNK_BYTES", 256)
    places, real, opened = set(), os.preadv, len(os.listdir("/proc/self/fd"))

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        places.add(np.frombuffer(buffers[0], np.uint8).ctypes.data)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    load(open_source(copied))
    assert len(places) == reader.NUM_THREADS + 2
    assert len(os.listdir("/proc/self/fd")) == opened
