"""The header of a safetensors file, written and read: what lies where. Reads no weights, needs no torch.

The file is the length of the header (8 bytes, little endian), the header (JSON), and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distllm.engine.files import shown
from distllm.errors import CheckpointError
from distllm.models.spec import DTYPE_BYTES, DType
from distllm.parallel.sharding import TensorShard

TAGS: dict[DType, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
LENGTH_BYTES = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    tag: str  # of its dtype, as the file says it
    shape: tuple[int, ...]
    start: int  # [start, stop) in the file; not checked against the shape
    stop: int


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name. They fill the file: no gap, no overlap, nothing missing.

    Raises CheckpointError, naming the file.
    """
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
            if not 0 < length <= min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            return _parse(opened.read(length), size)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged or incomplete: {error}") from error


def make_header(shards: Sequence[TensorShard], dtype: DType) -> bytes:
    """Of a file with these tensors in this order; padded, so that they are aligned to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for shard in shards:
        size = math.prod(shard.shape) * DTYPE_BYTES[dtype]
        entries[shard.name] = {
            "dtype": TAGS[dtype],
            "shape": shard.shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _parse(text: bytes, file_size: int) -> dict[str, Entry]:
    data = json.loads(text, object_pairs_hook=_object)
    if not isinstance(data, dict):
        raise ValueError(f"the header holds a {type(data).__name__}, not an object")
    data.pop("__metadata__", None)
    base = LENGTH_BYTES + len(text)
    entries = {name: _parse_entry(name, entry, base) for name, entry in data.items()}
    end = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise ValueError(f"{shown(name)} starts at byte {entry.start} instead of {end}")
        end = entry.stop
    if end != file_size:
        raise ValueError(f"{file_size} bytes instead of {end}")
    return entries


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two tensors with one name, readers of this format take different ones."""
    data = dict(pairs)
    if len(data) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the header says {shown(twice)} twice")
    return data


def _parse_entry(name: str, entry: Any, base: int) -> Entry:
    try:
        tag, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{shown(name)} has no dtype, shape and data_offsets") from error
    if any(type(number) is not int or number < 0 for number in (*shape, start, stop)) or stop < start:
        raise ValueError(f"{shown(name)} has a shape or data_offsets that cannot be")
    return Entry(str(tag), shape, base + start, base + stop)
