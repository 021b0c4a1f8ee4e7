"""Writing safetensors as a stream: the header first, since shapes are known, then tensor by tensor."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from distllm.engine.dtypes import checksum, tensor_bytes
from distllm.engine.format import StoredTensor
from distllm.models.spec import DTYPE_BYTES, DType
from distllm.parallel.sharding import TensorShard

_TAGS: dict[DType, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def write_shards(
    path: Path, shards: Sequence[TensorShard], dtype: DType, make: Callable[[TensorShard], torch.Tensor]
) -> Iterator[tuple[str, StoredTensor]]:
    """Write make(shard) for each shard, in order, holding one at a time. Yields each one's place.

    make returns a contiguous CPU tensor of the shard's shape in `dtype`. Raises OSError; the file is then
    incomplete. The file is complete when the iterator is exhausted.
    """
    with path.open("wb") as file:
        file.write(_header(shards, dtype))
        for shard in shards:
            tensor = make(shard)
            assert tensor.shape == shard.shape, f"{shard.name}: {tuple(tensor.shape)} is not {shard.shape}"
            stored = StoredTensor(file.tell(), shard.shape, checksum(tensor))
            file.write(tensor_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())  # a full disk must fail here, not after the engine was declared complete
            yield shard.name, stored


def _header(shards: Sequence[TensorShard], dtype: DType) -> bytes:
    """The JSON's length, then the JSON: dtype, shape and byte range of each tensor, padded to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for shard in shards:
        size = math.prod(shard.shape) * DTYPE_BYTES[dtype]
        entries[shard.name] = {
            "dtype": _TAGS[dtype],
            "shape": shard.shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
