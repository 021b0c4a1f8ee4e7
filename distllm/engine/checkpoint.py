"""A Hugging Face model folder as a WeightSource: config.json and safetensors files. Weights are data:
nothing in the folder is executed or unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from distllm.engine.dtypes import torch_dtype
from distllm.engine.extents import DiskTensor, Extent, read_extents
from distllm.engine.files import inside, read_json
from distllm.engine.header import TAGS, Entry, read_header
from distllm.engine.resolve import read_spec
from distllm.engine.source import Block
from distllm.errors import CheckpointError
from distllm.models.registry import family_named
from distllm.models.shards import slot_shapes
from distllm.models.spec import DTYPE_BYTES
from distllm.parallel.sharding import TensorShard

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPE_OF_TAG = {tag: dtype for dtype, tag in TAGS.items()}


class HFCheckpoint:
    """Opens every file and checks each tensor's presence, shape and type: a bad folder fails here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec = read_spec(path)
        family = family_named(self.spec.family)
        shapes = slot_shapes(self.spec)
        names = {slot: family.tensor_name(slot) for slot in shapes}
        file_of = _locate(path, list(names.values()))
        headers = {file: read_header(inside(path, file)) for file in dict.fromkeys(file_of.values())}
        self._tensors = {
            slot: _checked(path / file_of[name], name, headers[file_of[name]], shapes[slot])
            for slot, name in names.items()
        }

    def read(self, shards: Sequence[TensorShard], device: torch.device) -> Iterator[Block]:
        wanted = [(shard.name, piece) for shard in shards for piece in shard.pieces]
        return read_extents(
            [Extent(self._tensors[p.slot], name, p.dim, p.start, p.stop, p.dst_start) for name, p in wanted],
            device,
        )


def _checked(file: Path, name: str, header: dict[str, Entry], shape: tuple[int, ...]) -> DiskTensor:
    """The tensor of that name, if it is in the file with this shape and a supported dtype."""
    if name not in header:
        raise CheckpointError(f"{file} has no tensor {name}")
    entry, where = header[name], f"{file}: {name}"
    if entry.shape != shape:
        raise CheckpointError(f"{where} has shape {list(entry.shape)}; config.json asks for {list(shape)}")
    if entry.tag not in DTYPE_OF_TAG:
        raise CheckpointError(f"{where} is stored as {entry.tag}; supported: {', '.join(DTYPE_OF_TAG)}")
    dtype = DTYPE_OF_TAG[entry.tag]
    size, needed = entry.stop - entry.start, math.prod(shape) * DTYPE_BYTES[dtype]
    if size != needed:
        raise CheckpointError(f"{where} has {size} bytes; its shape in {entry.tag} needs {needed}")
    return DiskTensor(file, entry.start, name, shape, torch_dtype(dtype))


def _locate(path: Path, names: list[str]) -> dict[str, str]:
    """The file of each tensor: the one file, or what the index says."""
    if (path / SINGLE).exists():
        return dict.fromkeys(names, SINGLE)
    if not (path / INDEX).exists():
        raise _no_weights(path)
    weight_map = read_json(inside(path, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path / INDEX} has no weight_map")
    for name in names:
        if name not in weight_map:
            raise CheckpointError(f"{path / INDEX} lists no tensor {name}")
    return {name: weight_map[name] for name in names}


def _no_weights(path: Path) -> CheckpointError:
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        return CheckpointError(
            f"{path} has only pickled weights (.bin, .pt), which are never read; save as safetensors"
        )
    return CheckpointError(f"{path} has no weights: neither {SINGLE} nor {INDEX}")
