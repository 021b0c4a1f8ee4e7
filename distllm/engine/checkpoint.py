"""A Hugging Face model folder as a WeightSource: config.json and safetensors files. Weights are data:
nothing in the folder is executed or unpickled.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distllm.engine.dtypes import torch_dtype
from distllm.engine.extents import DiskTensor, Extent, read_extents
from distllm.engine.files import find_file, inside, read_json, shown
from distllm.engine.header import TAGS, Entry, read_header
from distllm.engine.resolve import read_spec
from distllm.engine.source import Block
from distllm.errors import CheckpointError
from distllm.models.registry import family_named
from distllm.models.shards import slot_shapes
from distllm.models.sources import Source
from distllm.models.spec import DTYPE_BYTES
from distllm.parallel.sharding import Piece, TensorShard

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPE_OF_TAG = {tag: dtype for dtype, tag in TAGS.items()}


@dataclass(frozen=True)
class StoredSlot:
    """A slot in a file."""

    tensor: DiskTensor
    source: Source

    def extents(self, shard: str, piece: Piece) -> Iterator[Extent]:
        """What a shard takes of it, span by span."""
        region = [(0, size) for size in self.source.slot_shape]
        region[piece.dim] = (piece.start, piece.stop)
        start = piece.origin(len(region))
        turn = -1 if self.source.transposed else 1
        for span, behind in self.source.locate(*region[0]):
            stored, dst = (span, *region[1:]), (start[0] + behind, *start[1:])
            yield Extent(self.tensor, shard, stored[::turn], dst[::turn], self.source.transposed)


class HFCheckpoint:
    """Opens every file and checks each tensor's presence, shape and type: a bad folder fails here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec = read_spec(path)
        family = family_named(self.spec.family)
        slots = slot_shapes(self.spec).items()
        self._slots = find_slots(path, {slot: family.source(self.spec, slot, shape) for slot, shape in slots})

    def read(self, shards: Sequence[TensorShard], device: torch.device) -> Iterator[Block]:
        wanted = [(shard.name, piece) for shard in shards for piece in shard.pieces]
        return read_extents(
            [extent for name, piece in wanted for extent in self._slots[piece.slot].extents(name, piece)],
            device,
        )


def find_slots(path: Path, sources: Mapping[str, Source]) -> dict[str, StoredSlot]:
    """The slots in a folder's files, where their sources say. Other tensors are not looked at.

    Raises CheckpointError unless every tensor is there, in the shape that is asked for and a supported dtype.
    """
    listing, file_of = _list_tensors(path)
    names = {slot: _choose(listing, file_of, source.names) for slot, source in sources.items()}
    shapes = {names[slot]: source.shape for slot, source in sources.items()}  # fused slots share one
    files = dict.fromkeys(file_of[name] for name in shapes)
    headers = {file: read_header(inside(path, file)) for file in files}
    tensors = {
        name: _checked(path / file_of[name], name, headers[file_of[name]], shape)
        for name, shape in shapes.items()
    }
    return {slot: StoredSlot(tensors[names[slot]], source) for slot, source in sources.items()}


def _choose(listing: str, file_of: Mapping[str, str], names: Sequence[str]) -> str:
    """The first of a tensor's possible names that the checkpoint has."""
    for name in names:
        if name in file_of:
            return name
    raise CheckpointError(f"{listing} no tensor {' or '.join(names)}")


def _checked(file: Path, name: str, header: dict[str, Entry], shape: tuple[int, ...]) -> DiskTensor:
    """The tensor of that name, if it is in the file with this shape and a supported dtype."""
    if name not in header:
        raise CheckpointError(f"{file} has no tensor {name}")
    entry, where = header[name], f"{file}: {name}"
    if entry.shape != shape:
        found = reprlib.repr(list(entry.shape))
        raise CheckpointError(f"{where} has shape {found}; config.json asks for {list(shape)}")
    if entry.tag not in DTYPE_OF_TAG:
        raise CheckpointError(
            f"{where} is stored as {shown(entry.tag)}; supported: {', '.join(DTYPE_OF_TAG)}"
        )
    dtype = DTYPE_OF_TAG[entry.tag]
    size, needed = entry.stop - entry.start, math.prod(shape) * DTYPE_BYTES[dtype]
    if size != needed:
        raise CheckpointError(f"{where} has {size} bytes; its shape in {entry.tag} needs {needed}")
    return DiskTensor(file, entry.start, name, shape, torch_dtype(dtype))


def _list_tensors(path: Path) -> tuple[str, Mapping[str, str]]:
    """The file of each tensor, as the one file or the index says; and how a sentence on it begins."""
    if single := find_file(path, SINGLE):
        return f"{single} has", dict.fromkeys(read_header(single), SINGLE)
    index = find_file(path, INDEX)
    if not index:
        raise _no_weights(path)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{index}: {shown(name)} is in {reprlib.repr(file)}: no file name")
    return f"{index} lists", weight_map


def _no_weights(path: Path) -> CheckpointError:
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        return CheckpointError(
            f"{path} has only pickled weights (.bin, .pt), which are never read; save as safetensors"
        )
    return CheckpointError(f"{path} has no weights: neither {SINGLE} nor {INDEX}")
