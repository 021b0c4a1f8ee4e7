"""Writing safetensors as a stream: the header first, since shapes are known, then tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from distllm.engine.checksum import as_hex, crc32
from distllm.engine.dtypes import tensor_bytes
from distllm.engine.format import StoredTensor
from distllm.engine.header import make_header
from distllm.models.spec import DType
from distllm.parallel.sharding import TensorShard


def write_shards(
    path: Path, shards: Sequence[TensorShard], dtype: DType, make: Callable[[TensorShard], torch.Tensor]
) -> Iterator[tuple[str, StoredTensor]]:
    """Write make(shard) for each shard, in order, holding one at a time. Yields each one's place.

    make returns a contiguous CPU tensor of the shard's shape in `dtype`. Raises OSError; the file is then
    incomplete. The file is complete when the iterator is exhausted.
    """
    with path.open("wb") as file:
        file.write(make_header(shards, dtype))
        for shard in shards:
            tensor = make(shard)
            assert tensor.shape == shard.shape, f"{shard.name}: {tuple(tensor.shape)} is not {shard.shape}"
            stored = StoredTensor(file.tell(), shard.shape, as_hex(crc32(tensor)))
            file.write(tensor_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())  # a full disk must fail here, not after the engine was declared complete
            yield shard.name, stored
