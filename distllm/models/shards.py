"""Which tensors a rank owns, as a table. Pure arithmetic on a DecoderSpec and a RankLayout: no torch, no
file.

The loader, the builder, re-sharding, the decoder and `distllm plan` all read this one table.
"""

from __future__ import annotations

from collections.abc import Iterator

from distllm.errors import LayoutError
from distllm.models.moe_spec import MoESpec
from distllm.models.spec import DecoderSpec
from distllm.parallel.layout import RankLayout
from distllm.parallel.sharding import (
    Span,
    TensorShard,
    column_shards,
    replicated,
    row_shards,
    split_heads,
    split_kv_heads,
    split_layers,
    split_range,
    stacked,
    valid_tp_sizes,
    vocab_shard,
)

EMBED = "embed.weight"
POSITIONS = "positions.weight"
HEAD = "head.weight"


def check_layout(spec: DecoderSpec, layout: RankLayout) -> None:
    """Raise LayoutError unless the model can be cut so; the text says which sizes would work."""
    valid = valid_tp_sizes(spec.num_heads, spec.num_kv_heads)
    if layout.tp_size not in valid:
        sizes = ", ".join(map(str, valid[:16])) + (f", … {valid[-1]}" if len(valid) > 16 else "")
        raise LayoutError(
            f"tp {layout.tp_size} does not fit {spec.num_heads} attention heads and "
            f"{spec.num_kv_heads} KV heads; tp can be {sizes}"
        )
    split_layers(spec.num_layers, layout.pp_size, layout.pp_rank)


def stage_layers(spec: DecoderSpec, layout: RankLayout) -> range:
    """The layers of this rank's stage."""
    return split_layers(spec.num_layers, layout.pp_size, layout.pp_rank)


def local_heads(spec: DecoderSpec, layout: RankLayout) -> Span:
    """[start, stop) of this rank's query heads."""
    return split_heads(spec.num_heads, spec.num_kv_heads, layout.tp_size, layout.tp_rank)


def local_kv_heads(spec: DecoderSpec, layout: RankLayout) -> Span:
    """[start, stop) of this rank's KV heads: those that its query heads read."""
    return split_kv_heads(spec.num_kv_heads, layout.tp_size, layout.tp_rank)


def head_name(spec: DecoderSpec) -> str:
    """The tensor of the output head: the embedding itself where the two are tied."""
    return EMBED if spec.tied_embeddings else HEAD


def layer_linears(spec: DecoderSpec, layer: int) -> tuple[str, ...]:
    """The products of a layer, by the names of their shards, in the order in which they run; of the experts'
    own, which run as one operation, none.
    """
    mlp = (
        ("moe.router",) if spec.layer_moe(layer) else ("mlp.gate_up" if spec.gated else "mlp.up", "mlp.down")
    )
    return "attn.qkv", "attn.o", *mlp


def position_rows(spec: DecoderSpec) -> int:
    """Rows of the table of learned positions; 0 without one."""
    return 0 if spec.learned_positions is None else spec.max_position_embeddings + spec.learned_positions


def shard_table(spec: DecoderSpec, layout: RankLayout) -> list[TensorShard]:
    """Every tensor that this rank holds, in the order in which it is stored."""
    return list(_shards(spec, layout))


def slot_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """The whole model's slots, uncut: what one rank alone would read, piece by piece."""
    shapes = {}
    for shard in shard_table(spec, RankLayout()):
        for piece in shard.pieces:
            shapes[piece.slot] = piece.shape(shard.matrix_shape)
    return shapes


def _shards(spec: DecoderSpec, layout: RankLayout) -> Iterator[TensorShard]:
    vocab = (spec.vocab_size, spec.hidden_size, layout.tp_size, layout.tp_rank)
    if layout.is_first_stage:
        yield vocab_shard(EMBED, *vocab)
    if layout.is_first_stage and position_rows(spec):
        yield replicated(POSITIONS, position_rows(spec), spec.hidden_size)
    if layout.is_first_stage and spec.embedding_norm:
        yield from _norm(spec, "embed_norm")
    for layer in stage_layers(spec, layout):
        yield from _attention_shards(spec, layout, f"layers.{layer}")
        yield from _mlp_shards(spec, layout, layer)
    if layout.is_last_stage:
        yield from _norm(spec, "final_norm")
    if layout.is_last_stage and not (spec.tied_embeddings and layout.is_first_stage):
        yield vocab_shard(head_name(spec), *vocab)


def _attention_shards(spec: DecoderSpec, layout: RankLayout, at: str) -> Iterator[TensorShard]:
    q = _rows(local_heads(spec, layout), spec.head_dim)
    kv = _rows(local_kv_heads(spec, layout), spec.head_dim)
    qkv = [(f"{at}.attn.q", q), (f"{at}.attn.k", kv), (f"{at}.attn.v", kv)]
    yield from _norm(spec, f"{at}.attn_norm")
    yield from column_shards(f"{at}.attn.qkv", qkv, spec.hidden_size, spec.qkv_bias)
    if spec.qk_norm:
        yield replicated(f"{at}.attn.q_norm.weight", spec.head_dim)
        yield replicated(f"{at}.attn.k_norm.weight", spec.head_dim)
    yield from row_shards(f"{at}.attn.o", q, spec.hidden_size, spec.out_bias)
    if spec.post_norms:
        yield from _norm(spec, f"{at}.attn_post_norm")


def _mlp_shards(spec: DecoderSpec, layout: RankLayout, layer: int) -> Iterator[TensorShard]:
    at, moe = f"layers.{layer}", spec.layer_moe(layer)
    if spec.residual != "parallel_shared":
        yield from _norm(spec, f"{at}.mlp_norm")
    yield from _dense_shards(spec, layout, layer) if moe is None else _expert_shards(spec, moe, layout, at)
    if spec.post_norms:
        yield from _norm(spec, f"{at}.mlp_post_norm")


def _dense_shards(spec: DecoderSpec, layout: RankLayout, layer: int) -> Iterator[TensorShard]:
    at = f"layers.{layer}"
    width = split_range(spec.intermediate_size, layout.tp_size, layout.tp_rank)
    up = [(f"{at}.mlp.gate", width), (f"{at}.mlp.up", width)] if spec.gated else [(f"{at}.mlp.up", width)]
    up_name, down_name = layer_linears(spec, layer)[2:]
    yield from column_shards(f"{at}.{up_name}", up, spec.hidden_size, spec.mlp_bias)
    yield from row_shards(f"{at}.{down_name}", width, spec.hidden_size, spec.mlp_bias)


def _expert_shards(spec: DecoderSpec, moe: MoESpec, layout: RankLayout, at: str) -> Iterator[TensorShard]:
    """Every rank holds a part of every expert, so that all have the same work whatever the router says."""
    width = split_range(moe.intermediate_size, layout.tp_size, layout.tp_rank)
    gate_up: list[TensorShard] = []
    down: list[TensorShard] = []
    for expert in (f"{at}.moe.experts.{number}" for number in range(moe.num_experts)):
        parts = [(f"{expert}.gate", width), (f"{expert}.up", width)]
        gate_up += column_shards(f"{expert}.gate_up", parts, spec.hidden_size, bias=False)
        down += row_shards(f"{expert}.down", width, spec.hidden_size, bias=False)
    yield replicated(f"{at}.moe.router.weight", moe.num_experts, spec.hidden_size)
    yield stacked(f"{at}.moe.gate_up.weight", gate_up)
    yield stacked(f"{at}.moe.down.weight", down)


def _norm(spec: DecoderSpec, name: str) -> Iterator[TensorShard]:
    yield replicated(f"{name}.weight", spec.hidden_size)
    if spec.norm.kind == "layer":
        yield replicated(f"{name}.bias", spec.hidden_size)


def _rows(heads: Span, head_dim: int) -> Span:
    return heads[0] * head_dim, heads[1] * head_dim
