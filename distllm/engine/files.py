"""Reading a model folder: files of bounded size, and only files of that folder. Knows no tensor.

What a folder says is shown in one printable line, however it is made.
"""

from __future__ import annotations

import json
import os
import reprlib
from pathlib import Path
from typing import Any

from distllm.errors import CheckpointError

MAX_JSON_BYTES = 256 * 2**20
MAX_NAME = 1024  # characters of a file's or a tensor's name


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """A whole file. Raises CheckpointError if it cannot be read or is larger than max_bytes."""
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > max_bytes:
        raise CheckpointError(f"{path} is larger than {max_bytes} bytes")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError, naming the file, for whatever is wrong with it."""
    content = read_bytes(path, MAX_JSON_BYTES)
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not an object")
    return data


def shown(name: object) -> str:
    """A name that a folder gives, for an error's text: as it is, unless it would break the line."""
    plain = isinstance(name, str) and name.isprintable() and len(name) <= MAX_NAME
    return str(name) if plain else reprlib.repr(name)


def inside(folder: Path, name: object) -> Path:
    """folder/name, refusing names that lead out of the folder: a model folder cannot name other files. Nor
    pipes and devices, which would be waited for.

    A link may lead out in one case: to the `blobs` beside `snapshots` in which a Hugging Face cache keeps
    the files.
    """
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise CheckpointError(f"{folder}: {reprlib.repr(name)} is not a file name")
    home, target = folder.resolve(), _resolved(folder / name)
    if Path(name).is_absolute() or ".." in Path(name).parts or not _belongs(home, target):
        raise CheckpointError(f"{folder}: {name} lies outside the folder; put the file itself there")
    # Not by Path, which raises for a name that is too long to be.
    if os.path.exists(target) and not os.path.isfile(target):
        raise CheckpointError(f"{folder / name} is not a regular file")
    return folder / name


def find_file(folder: Path, name: str) -> Path | None:
    """`inside`, or None where the folder has nothing of that name. A link is something, wherever it leads: it
    is refused, not taken for a file that is missing.
    """
    return inside(folder, name) if os.path.lexists(folder / name) else None


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _belongs(home: Path, target: Path) -> bool:
    in_cache = home.parent.name == "snapshots" and target.is_relative_to(home.parent.parent / "blobs")
    return target.is_relative_to(home) or in_cache
