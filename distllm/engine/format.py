"""engine.json: what an engine folder says of itself. Data and its checks; reads no weights, needs no torch.

my-engine/
  engine.json             this file: version, spec, layout, dtype, index of tensors with checksums, provenance
  rank00.safetensors …    the tensors of shard_table(spec, layout of that rank), in that order, one dtype
  tokenizer.json …        copied from the model folder
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distllm.engine.files import inside, read_json, shown
from distllm.errors import CheckpointError
from distllm.models.checks import check_choice, check_int
from distllm.models.shards import check_layout, shard_table
from distllm.models.spec import DTYPE_BYTES, DTYPES, DecoderSpec, DType
from distllm.parallel.layout import RankLayout

ENGINE_JSON = "engine.json"
FORMAT_VERSION = 3
MAX_RANKS = 4096


def rank_file(rank: int) -> str:
    return f"rank{rank:02d}.safetensors"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its rank's file, and the CRC-32 of its bytes."""

    offset: int  # from the start of the file
    shape: tuple[int, ...]
    checksum: str  # hexadecimal

    def num_bytes(self, dtype: DType) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[dtype]


@dataclass(frozen=True)
class EngineIndex:
    """engine.json, checked."""

    spec: DecoderSpec
    tp_size: int
    pp_size: int
    dtype: DType  # of every stored tensor
    eos_token_id: tuple[int, ...]
    source: str  # name of the model folder that it was built from
    distllm_version: str
    ranks: tuple[dict[str, StoredTensor], ...]  # by rank, in file order

    @property
    def layout(self) -> RankLayout:
        return RankLayout(self.tp_size, self.pp_size)


def read_index(path: Path) -> EngineIndex:
    """The index of an engine folder. Raises CheckpointError if it is damaged or of another format version."""
    file = inside(path, ENGINE_JSON)
    data = read_json(file)
    version = data.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format_version {shown(version)}, not {FORMAT_VERSION}; build the engine again"
        )
    try:
        index = _parse(data)
        _check_tensors(index)
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # CheckpointError is a ValueError
        raise CheckpointError(f"{file} is damaged ({shown(str(error))}); build the engine again") from error
    return index


def _parse(data: dict[str, Any]) -> EngineIndex:
    check_int("tp_size", data["tp_size"], 1, MAX_RANKS)
    check_int("pp_size", data["pp_size"], 1, MAX_RANKS // data["tp_size"])
    check_choice("dtype", data["dtype"], DTYPES)
    ranks = tuple({name: _parse_tensor(stored) for name, stored in rank.items()} for rank in data["ranks"])
    spec = DecoderSpec.from_dict(data["spec"])
    eos = tuple(data["eos_token_id"])
    return EngineIndex(**{**data, "spec": spec, "eos_token_id": eos, "ranks": ranks})


def _parse_tensor(stored: dict[str, Any]) -> StoredTensor:
    check_int("offset", stored["offset"], 8, 2**50)
    return StoredTensor(stored["offset"], tuple(int(n) for n in stored["shape"]), stored["checksum"])


def _check_tensors(index: EngineIndex) -> None:
    """The tensors must be those that the table gives for this spec and layout, in its order."""
    check_layout(index.spec, index.layout)
    if len(index.ranks) != index.layout.world_size:
        raise CheckpointError(f"{len(index.ranks)} ranks listed for {index.layout.equation}")
    for rank, stored in enumerate(index.ranks):
        wanted = [(shard.name, shard.shape) for shard in shard_table(index.spec, index.layout.at(rank))]
        if [(name, tensor.shape) for name, tensor in stored.items()] != wanted:
            raise CheckpointError(f"the tensors of rank {rank} are not those of {index.layout.equation}")
        if any(tensor.offset % DTYPE_BYTES[index.dtype] for tensor in stored.values()):
            raise CheckpointError(f"a tensor of rank {rank} is not aligned")
