"""Building an engine: the ranks of a job write the shards of a layout, tensor by tensor, all or nothing.

What fails on one rank (a full disk, a damaged file) becomes the same error on all of them within one tensor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from distllm import __version__
from distllm.comm.agree import agree
from distllm.comm.base import Control
from distllm.engine.dtypes import torch_dtype
from distllm.engine.files import find_file
from distllm.engine.format import ENGINE_JSON, FORMAT_VERSION, rank_file
from distllm.engine.load import Progress, load_weights, num_bytes
from distllm.engine.resolve import eos_token_ids
from distllm.engine.source import WeightSource
from distllm.engine.staging import COPIED, begin, commit, writing
from distllm.engine.writer import write_shards
from distllm.models.shards import check_layout, shard_table
from distllm.models.spec import DType
from distllm.parallel.layout import RankLayout
from distllm.parallel.sharding import TensorShard

T = TypeVar("T")
RankIndex = dict[str, Any]  # tensor name → StoredTensor as JSON data, in file order


def build_engine(
    source: WeightSource,
    out_dir: str | Path,
    tp_size: int,
    pp_size: int,
    dtype: DType,
    control: Control,
    progress: Progress | None = None,
) -> Path:
    """Write the engine of `source` for tp_size × pp_size to out_dir and return that path.

    Collective: every rank of control, with the same arguments, on a file system that all of them see. Their
    number is independent of the layout: they share its files round-robin. progress counts this rank's bytes.
    Raises LayoutError, CheckpointError or UserError, the same on every rank, with nothing left behind and an
    engine at out_dir as it was.
    """
    layout = RankLayout(tp_size, pp_size)
    check_layout(source.spec, layout)
    out = Path(out_dir).absolute()
    partial = Path(_from_root(control, lambda: str(begin(out))))
    try:
        ranks = _write_ranks(control, source, layout, dtype, partial, out, progress)
        _from_root(control, lambda: _finish(_index(source, layout, dtype, ranks), source.path, partial, out))
    finally:
        # After success it is gone. Its removal must not hide the error that led here.
        if control.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
    return out


def _from_root(control: Control, work: Callable[[], str]) -> str:
    """Run work() on rank 0; every rank gets its result, or its error."""
    result = agree(control, work if control.rank == 0 else str)
    return control.all_gather_bytes(result.encode())[0].decode()


def _write_ranks(
    control: Control,
    source: WeightSource,
    layout: RankLayout,
    dtype: DType,
    partial: Path,
    out: Path,
    progress: Progress | None,
) -> list[RankIndex]:
    """Write this rank's share of the files. Returns the index of every rank of the layout."""
    tables = {rank: shard_table(source.spec, layout.at(rank)) for rank in range(layout.world_size)}
    shares = [range(first, layout.world_size, control.size) for first in range(control.size)]
    mine = {rank: tables[rank] for rank in shares[control.rank]}
    index: dict[int, RankIndex] = {rank: {} for rank in mine}
    steps = _write_files(mine, index, partial, dtype, _assembler(source, mine, dtype, progress))

    def step() -> None:
        with writing(out):
            next(steps, None)

    # In step with each other, so that no rank waits long for another, and a failure stops all of them soon.
    # The last step closes the last file.
    for _ in range(max(sum(len(tables[rank]) for rank in share) for share in shares) + 1):
        agree(control, step)
    everyone = control.all_gather_bytes(json.dumps(index).encode())
    merged = {rank: stored for part in everyone for rank, stored in json.loads(part).items()}
    return [merged[str(rank)] for rank in range(layout.world_size)]


def _write_files(
    tables: dict[int, list[TensorShard]],
    index: dict[int, RankIndex],
    partial: Path,
    dtype: DType,
    make: Callable[[TensorShard], torch.Tensor],
) -> Iterator[None]:
    """Write the ranks' files, one tensor at each step, filling their indices."""
    for rank, shards in tables.items():
        for name, stored in write_shards(partial / rank_file(rank), shards, dtype, make):
            index[rank][name] = asdict(stored)
            yield


def _assembler(
    source: WeightSource,
    tables: dict[int, list[TensorShard]],
    dtype: DType,
    progress: Progress | None,
) -> Callable[[TensorShard], torch.Tensor]:
    """A function that makes one shard, and reports the bytes made so far."""
    target = torch_dtype(dtype)
    total = sum(num_bytes(shard, target) for shards in tables.values() for shard in shards)
    done = 0

    def make(shard: TensorShard) -> torch.Tensor:
        nonlocal done
        tensor = load_weights(source, [shard], target, torch.device("cpu"))[shard.name]
        done += tensor.nbytes
        if progress:
            progress(done, total)
        return tensor

    return make


def _index(
    source: WeightSource, layout: RankLayout, dtype: DType, ranks: Sequence[RankIndex]
) -> dict[str, Any]:
    """engine.json; `read_index` is its counterpart."""
    return {
        "format_version": FORMAT_VERSION,
        "spec": source.spec.to_dict(),
        "tp_size": layout.tp_size,
        "pp_size": layout.pp_size,
        "dtype": dtype,
        "eos_token_id": eos_token_ids(source.path),
        "source": source.path.resolve().name,
        "distllm_version": __version__,
        "ranks": ranks,
    }


def _finish(index: dict[str, Any], model: Path, partial: Path, out: Path) -> str:
    """Copy what belongs to the model, write engine.json last, and put the folder in its place."""
    with writing(out):
        for name in COPIED:
            if file := find_file(model, name):
                shutil.copyfile(file, partial / name)
        (partial / ENGINE_JSON).write_text(json.dumps(index, indent=1), encoding="utf-8")
        commit(partial, out)
    return ""
