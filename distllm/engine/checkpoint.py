"""A Hugging Face model folder as a WeightSource: config.json and safetensors files. Weights are data:
nothing in the folder is executed or unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from distllm.engine.files import inside, read_json
from distllm.engine.resolve import read_spec
from distllm.errors import CheckpointError
from distllm.models.registry import family_named
from distllm.models.shards import slot_shapes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16")


class HFCheckpoint:
    """Opens every file and checks each tensor's presence, shape and type: a bad folder fails here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec = read_spec(path)
        family = family_named(self.spec.family)
        self._shapes = slot_shapes(self.spec)
        self._names = {slot: family.tensor_name(slot) for slot in self._shapes}
        self._file_of = _locate(path, list(self._names.values()))
        self._files = {name: _open(inside(path, name)) for name in dict.fromkeys(self._file_of.values())}
        self._order = self._file_order()
        for slot in self._shapes:
            self._check(slot)

    def read(self, slot: str, dim: int, start: int, stop: int) -> torch.Tensor:
        name = self._names[slot]
        cut = self._files[self._file_of[name]].get_slice(name)
        tensor: torch.Tensor = cut[start:stop] if dim == 0 else cut[:, start:stop]
        return tensor

    def position(self, slot: str) -> tuple[int, int]:
        return self._order[self._names[slot]]

    def _file_order(self) -> dict[str, tuple[int, int]]:
        return {
            name: (number, place)
            for number, (file_name, file) in enumerate(self._files.items())
            for place, name in enumerate(file.offset_keys())
            if self._file_of.get(name) == file_name
        }

    def _check(self, slot: str) -> None:
        name, shape = self._names[slot], self._shapes[slot]
        file = self._file_of[name]
        if name not in self._order:
            raise CheckpointError(f"{self.path / file} has no tensor {name}")
        where, stored = f"{self.path / file}: {name}", self._files[file].get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise CheckpointError(
                f"{where} has shape {stored.get_shape()}; config.json asks for {list(shape)}"
            )
        if stored.get_dtype() not in FLOATS:
            raise CheckpointError(
                f"{where} is stored as {stored.get_dtype()}; supported: {', '.join(FLOATS)}"
            )


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


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or incomplete: {error}") from error
