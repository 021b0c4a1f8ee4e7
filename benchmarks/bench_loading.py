"""How fast weights come from disk to the device, beside how fast the disk gives the same bytes to nobody.

    python benchmarks/bench_loading.py /scratch/llama-8b
    mpirun -n 4 python benchmarks/bench_loading.py /scratch/llama-8b -o loading.json

Makes a checkpoint of random bytes in the folder, unless it has one, builds its engine, and loads both, cut
over the ranks of this job. Cold: the page cache was told to forget the files; warm: they have just been read.
The ceiling is the best that rank 0 reaches when it reads the same bytes and uses none: by one thread or by as
many as the loader has, through the page cache or past it. A figure is the bytes of all files over wall time,
until the last rank has all its weights, in the best of --num-iters.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from distllm.cli.tables import print_table
from distllm.comm.base import Control
from distllm.comm.connect import open_control
from distllm.comm.devices import select_device
from distllm.engine import build_engine, load_weights, open_source, read_spec, reader
from distllm.engine.writer import write_shards
from distllm.models.registry import family_named
from distllm.models.shards import shard_table, slot_shapes
from distllm.models.spec import DecoderSpec
from distllm.ops.bench.report import Report
from distllm.ops.bench.timing import Summary, summarize
from distllm.parallel.layout import RankLayout
from distllm.parallel.sharding import TensorShard

SHAPE = Path(__file__).parent / "shapes" / "llama-8b"
FILE_BYTES = 5 * 10**9  # as large checkpoints are cut
READ_BYTES = 16 * 2**20
DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass(frozen=True)
class Result:
    """One way to read the checkpoint. Seconds of every iteration."""

    what: str
    cache: str  # cold, warm
    num_threads: int
    chunk_bytes: int
    num_bytes: int  # of the checkpoint
    time_s: Summary


def make_checkpoint(folder: Path, shape: Path, gigabytes: float | None) -> None:
    """config.json with as many of the shape's layers as fit, and files of random bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((shape / "config.json").read_text())
    if gigabytes is not None:
        config["num_hidden_layers"] = _num_layers(read_spec(shape), gigabytes * 1e9)
    (folder / "config.json").write_text(json.dumps(config))
    _write_files(folder)


def _num_layers(spec: DecoderSpec, room: float) -> int:
    sizes = {slot: 2 * math.prod(shape) for slot, shape in slot_shapes(spec).items()}
    layer = sum(size for slot, size in sizes.items() if slot.startswith("layers.0."))
    rest = sum(size for slot, size in sizes.items() if not slot.startswith("layers."))
    return max(1, min(spec.num_layers, int((room - rest) / layer)))


def _write_files(folder: Path) -> None:
    spec = read_spec(folder)
    family = family_named(spec.family)
    files: list[list[TensorShard]] = [[]]
    room = FILE_BYTES
    sources = [family.source(spec, *slot) for slot in slot_shapes(spec).items()]
    for name, shape in {source.names[0]: source.shape for source in sources}.items():
        size = 2 * math.prod(shape)
        if size > room and files[-1]:
            files.append([])
            room = FILE_BYTES
        files[-1].append(TensorShard(name, shape, ()))
        room -= size
    names = [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    rng = np.random.Generator(np.random.SFC64(0))
    for name, shards in zip(names, files, strict=True):
        for _ in write_shards(folder / name, shards, "bfloat16", lambda shard: _random(shard, rng)):
            pass
    weight_map = {shard.name: name for name, shards in zip(names, files, strict=True) for shard in shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _random(shard: TensorShard, rng: np.random.Generator) -> torch.Tensor:
    """Bytes that no file system can compress."""
    content = bytearray(rng.bytes(2 * math.prod(shard.shape)))
    return torch.frombuffer(content, dtype=torch.bfloat16).view(shard.shape)


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Drop the files from the page cache. Where a file system does not listen, cold shows as warm."""
    for file in weight_files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_only(folder: Path, num_threads: int, flags: int = 0) -> None:
    """Every byte, into memory that is overwritten at once. Each thread takes every n-th read of all files."""

    def read_part(index: int) -> None:
        buffer = mmap.mmap(-1, READ_BYTES)  # aligned to pages, as O_DIRECT asks
        for file in weight_files(folder):
            descriptor = os.open(file, os.O_RDONLY | flags)
            for offset in range(index * READ_BYTES, file.stat().st_size, num_threads * READ_BYTES):
                os.preadv(descriptor, [buffer], offset)
            os.close(descriptor)

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(read_part, range(num_threads)))


class Bench:
    """Measures on every rank at once; results count on rank 0."""

    def __init__(self, folder: Path, control: Control, device: torch.device, num_iters: int) -> None:
        self.results: list[Result] = []
        self._folder, self._control, self._device, self._num_iters = folder, control, device, num_iters

    def ceilings(self, num_threads: int) -> None:
        """By rank 0 alone: a host's disk is read once, whatever its number of ranks."""
        ways = [("read", 1, 0), ("read", num_threads, 0)]
        ways += [("read direct", n, DIRECT) for n in (1, num_threads) if DIRECT and self._supports_direct()]
        for what, threads, flags in ways:
            for cache in ("cold",) if flags else ("cold", "warm"):
                self._measure(what, cache, threads, READ_BYTES, lambda t=threads, f=flags: self._read(t, f))

    def load(self, what: str, folder: Path, num_threads: int, chunk_bytes: int) -> None:
        """load_weights with these constants of the reader, in the dtype of the checkpoint."""
        reader.NUM_THREADS, reader.CHUNK_BYTES = num_threads, chunk_bytes
        self._folder = folder
        for cache in ("cold", "warm"):
            self._measure(what, cache, num_threads, chunk_bytes, self._load)

    def _measure(
        self, what: str, cache: str, num_threads: int, chunk_bytes: int, work: Callable[[], None]
    ) -> None:
        num_bytes = sum(file.stat().st_size for file in weight_files(self._folder))
        if cache == "warm":  # whatever of it the iterations before have left there
            self._read(num_threads, 0)
        times = [self._time(cache, work) for _ in range(self._num_iters)]
        self.results.append(Result(what, cache, num_threads, chunk_bytes, num_bytes, summarize(times)))

    def _time(self, cache: str, work: Callable[[], None]) -> float:
        if cache == "cold" and self._control.local_rank == 0:
            forget(self._folder)
        self._control.all_gather_bytes(b"")
        start = time.perf_counter()
        work()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self._control.all_gather_bytes(b"")
        return time.perf_counter() - start

    def _read(self, num_threads: int, flags: int) -> None:
        if self._control.rank == 0:
            read_only(self._folder, num_threads, flags)

    def _load(self) -> None:
        source = open_source(self._folder)
        layout = RankLayout(self._control.size, 1).at(self._control.rank)
        load_weights(source, shard_table(source.spec, layout), torch.bfloat16, self._device)

    def _supports_direct(self) -> bool:
        """Of this file system; the same answer on every rank, since all take part in each measurement."""
        answer = b"yes"
        try:
            os.close(os.open(weight_files(self._folder)[0], os.O_RDONLY | DIRECT))
        except OSError:
            answer = b"no"
        return self._control.all_gather_bytes(answer)[0] == b"yes"


def show(results: list[Result]) -> None:
    best = {
        cache: max(rate(r) for r in results if r.cache == cache and r.what.startswith("read"))
        for cache in ("cold", "warm")
    }
    rows = [
        (
            r.what,
            r.cache,
            r.num_threads,
            r.chunk_bytes >> 20,
            f"{r.time_s.lowest:.2f}",
            f"{r.time_s.median:.2f}",
            f"{rate(r):.2f}",
            f"{100 * rate(r) / best[r.cache]:.0f} %",
        )
        for r in results
    ]
    header = ("what", "cache", "threads", "MiB", "best s", "median s", "GB/s", "of the ceiling")
    print_table(f"Loading {results[0].num_bytes / 1e9:.2f} GB", header, rows)


def rate(result: Result) -> float:
    """GB/s of the best iteration."""
    return result.num_bytes / result.time_s.lowest / 1e9


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--shape", type=click.Path(exists=True, path_type=Path), default=SHAPE, help="With config.json."
)
@click.option("--gigabytes", type=float, help="At most, by fewer layers. Default: all of the shape.")
@click.option("--num-threads", type=int, multiple=True, default=(reader.NUM_THREADS,), help="Repeatable.")
@click.option("--chunk-mib", type=int, multiple=True, default=(reader.CHUNK_BYTES >> 20,), help="Repeatable.")
@click.option("--num-iters", type=int, default=3, show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write all as JSON.")
def main(
    folder: Path,
    shape: Path,
    gigabytes: float | None,
    num_threads: tuple[int, ...],
    chunk_mib: tuple[int, ...],
    num_iters: int,
    output: Path | None,
) -> None:
    """Load a checkpoint and its engine, cold and warm, beside plain reads of the same bytes."""
    options: dict[str, Any] = {"folder": str(folder), "shape": shape.name, "num_iters": num_iters}
    control = open_control()
    device = select_device(control)
    if control.rank == 0 and not weight_files(folder):
        make_checkpoint(folder, shape, gigabytes)
    control.all_gather_bytes(b"")
    engine = folder / f"engine-tp{control.size}"
    if not (engine / "engine.json").exists():
        build_engine(open_source(folder), engine, control.size, 1, "bfloat16", control)
    bench = Bench(folder, control, device, num_iters)
    bench.ceilings(max(num_threads))
    for threads in num_threads:
        for mib in chunk_mib:
            bench.load("checkpoint", folder, threads, mib << 20)
            bench.load("engine", engine, threads, mib << 20)
    if control.rank == 0:
        show(bench.results)
        if output:
            command = shlex.join(["python", *sys.argv])
            results = {"loading": bench.results}
            Report("loading", command, control.size, options, None, results).write(output)


if __name__ == "__main__":
    main()
