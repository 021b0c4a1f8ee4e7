"""Which tensors a rank owns, as a table. Pure arithmetic on a DecoderSpec and a RankLayout: no torch, no
file.

The loader, the builder, re-sharding, the decoder and `distllm plan` all read this one table.
"""

from __future__ import annotations

from collections.abc import Iterator

from distllm.errors import LayoutError
from distllm.models.spec import DecoderSpec
from distllm.parallel.layout import RankLayout
from distllm.parallel.sharding import (
    Span,
    TensorShard,
    column_shards,
    replicated,
    row_shards,
    split_exact,
    split_kv_heads,
    split_layers,
    split_range,
    valid_tp_sizes,
    vocab_shard,
)

EMBED = "embed.weight"
FINAL_NORM = "final_norm.weight"
HEAD = "head.weight"


def check_layout(spec: DecoderSpec, layout: RankLayout) -> None:
    """Raise LayoutError unless the model can be cut so; the text says which sizes would work."""
    valid = valid_tp_sizes(spec.num_heads, spec.num_kv_heads)
    if layout.tp_size not in valid:
        raise LayoutError(
            f"tp {layout.tp_size} does not fit {spec.num_heads} attention heads and "
            f"{spec.num_kv_heads} KV heads; tp can be {', '.join(map(str, valid))}"
        )
    split_layers(spec.num_layers, layout.pp_size, layout.pp_rank)


def stage_layers(spec: DecoderSpec, layout: RankLayout) -> range:
    """The layers of this rank's stage."""
    return split_layers(spec.num_layers, layout.pp_size, layout.pp_rank)


def local_heads(spec: DecoderSpec, layout: RankLayout) -> Span:
    """[start, stop) of this rank's query heads."""
    return split_exact(spec.num_heads, layout.tp_size, layout.tp_rank, "num_attention_heads")


def local_kv_heads(spec: DecoderSpec, layout: RankLayout) -> Span:
    """[start, stop) of this rank's KV heads: those that its query heads read."""
    return split_kv_heads(spec.num_kv_heads, layout.tp_size, layout.tp_rank)


def head_name(spec: DecoderSpec) -> str:
    """The tensor of the output head: the embedding itself where the two are tied."""
    return EMBED if spec.tied_embeddings else HEAD


def shard_table(spec: DecoderSpec, layout: RankLayout) -> list[TensorShard]:
    """Every tensor that this rank holds, in the order in which it is stored."""
    return list(_shards(spec, layout))


def slot_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """The whole model's slots, uncut: what one rank alone would read, piece by piece."""
    shapes = {}
    for shard in shard_table(spec, RankLayout()):
        for piece in shard.pieces:
            shapes[piece.slot] = (*shard.shape[: piece.dim], piece.stop, *shard.shape[piece.dim + 1 :])
    return shapes


def _shards(spec: DecoderSpec, layout: RankLayout) -> Iterator[TensorShard]:
    vocab = (spec.vocab_size, spec.hidden_size, layout.tp_size, layout.tp_rank)
    if layout.is_first_stage:
        yield vocab_shard(EMBED, *vocab)
    for layer in stage_layers(spec, layout):
        yield from _layer_shards(spec, layout, f"layers.{layer}")
    if layout.is_last_stage:
        yield replicated(FINAL_NORM, spec.hidden_size)
    if layout.is_last_stage and not (spec.tied_embeddings and layout.is_first_stage):
        yield vocab_shard(head_name(spec), *vocab)


def _layer_shards(spec: DecoderSpec, layout: RankLayout, at: str) -> Iterator[TensorShard]:
    hidden = spec.hidden_size
    q = _rows(local_heads(spec, layout), spec.head_dim)
    kv = _rows(local_kv_heads(spec, layout), spec.head_dim)
    mlp = split_range(spec.intermediate_size, layout.tp_size, layout.tp_rank)
    qkv = [(f"{at}.attn.q", q), (f"{at}.attn.k", kv), (f"{at}.attn.v", kv)]
    gate_up = [(f"{at}.mlp.gate", mlp), (f"{at}.mlp.up", mlp)]

    yield replicated(f"{at}.attn_norm.weight", hidden)
    yield from column_shards(f"{at}.attn.qkv", qkv, hidden, spec.qkv_bias)
    yield from row_shards(f"{at}.attn.o", q, hidden, spec.out_bias)
    yield replicated(f"{at}.mlp_norm.weight", hidden)
    yield from column_shards(f"{at}.mlp.gate_up", gate_up, hidden, spec.mlp_bias)
    yield from row_shards(f"{at}.mlp.down", mlp, hidden, spec.mlp_bias)


def _rows(heads: Span, head_dim: int) -> Span:
    return heads[0] * head_dim, heads[1] * head_dim
