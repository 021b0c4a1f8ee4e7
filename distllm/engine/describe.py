"""What a layout gives each rank: layers, shards, bytes. Arithmetic for `distllm plan`; needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distllm.models.shards import check_layout, local_heads, local_kv_heads, shard_table, stage_layers
from distllm.models.spec import DTYPE_BYTES, DecoderSpec, DType
from distllm.parallel.layout import RankLayout
from distllm.parallel.sharding import TensorShard


@dataclass(frozen=True)
class ShardLine:
    """Tensors of one name and shape; `layers.*` stands for each layer of the stage."""

    name: str
    count: int
    shape: tuple[int, ...]
    num_bytes: int  # of all `count` together


@dataclass(frozen=True)
class RankDescription:
    """One rank's share of a model."""

    rank: int
    tp_rank: int
    pp_rank: int
    layers: tuple[int, int]  # [first, past the last)
    num_heads: int
    num_kv_heads: int
    shards: tuple[ShardLine, ...]
    weight_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True)
class ModelDescription:
    """The whole layout. num_parameters counts the model's own, without padding or replicas."""

    family: str
    equation: str
    dtype: DType
    num_parameters: int
    max_position_embeddings: int
    ranks: tuple[RankDescription, ...]

    @property
    def weight_bytes(self) -> int:
        """Of all ranks together: what an engine of this layout takes on disk."""
        return sum(rank.weight_bytes for rank in self.ranks)


def describe(spec: DecoderSpec, tp_size: int, pp_size: int, dtype: DType | None = None) -> ModelDescription:
    """dtype: of weights and KV cache; the checkpoint's if None. Raises LayoutError if it does not fit."""
    layout = RankLayout(tp_size, pp_size)
    check_layout(spec, layout)
    dtype = dtype or spec.dtype
    return ModelDescription(
        family=spec.family,
        equation=layout.equation,
        dtype=dtype,
        num_parameters=sum(math.prod(shard.shape) for shard in shard_table(spec, RankLayout())),
        max_position_embeddings=spec.max_position_embeddings,
        ranks=tuple(_describe_rank(spec, layout.at(rank), dtype) for rank in range(layout.world_size)),
    )


def _describe_rank(spec: DecoderSpec, layout: RankLayout, dtype: DType) -> RankDescription:
    layers = stage_layers(spec, layout)
    heads, kv_heads = local_heads(spec, layout), local_kv_heads(spec, layout)
    lines = _lines(shard_table(spec, layout), DTYPE_BYTES[dtype])
    return RankDescription(
        rank=layout.rank,
        tp_rank=layout.tp_rank,
        pp_rank=layout.pp_rank,
        layers=(layers.start, layers.stop),
        num_heads=heads[1] - heads[0],
        num_kv_heads=kv_heads[1] - kv_heads[0],
        shards=lines,
        weight_bytes=sum(line.num_bytes for line in lines),
        kv_bytes_per_token=2 * len(layers) * (kv_heads[1] - kv_heads[0]) * spec.head_dim * DTYPE_BYTES[dtype],
    )


def _lines(shards: list[TensorShard], itemsize: int) -> tuple[ShardLine, ...]:
    """One line for each name, in the table's order; all layers of a stage share theirs."""
    counts: dict[tuple[str, tuple[int, ...]], int] = {}
    for shard in shards:
        key = (_any_layer(shard.name), shard.shape)
        counts[key] = counts.get(key, 0) + 1
    return tuple(
        ShardLine(name, count, shape, count * math.prod(shape) * itemsize)
        for (name, shape), count in counts.items()
    )


def _any_layer(name: str) -> str:
    """layers.3.attn.o.weight → layers.*.attn.o.weight."""
    parts = name.split(".")
    return ".".join(["layers", "*", *parts[2:]]) if parts[0] == "layers" else name
