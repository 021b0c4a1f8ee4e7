"""The decoder: one forward pass for every family, on one rank's share of the weights.

Knows a spec, a layout and the tensor-parallel communicator; never requests, plans or other stages. Between
stages one tensor travels, [num_tokens, hidden_size]: hidden states with the residual already added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distllm.comm.base import TensorComm
from distllm.kernels import paged_attention, rope_and_cache_kv, rope_cos_sin
from distllm.kernels.batch import TokenBatch
from distllm.models.rope import rope_frequencies
from distllm.models.shards import EMBED, FINAL_NORM, head_name, local_heads, local_kv_heads, stage_layers
from distllm.models.spec import DecoderSpec
from distllm.parallel.layout import RankLayout
from distllm.parallel.linear import (
    ColumnParallelLinear,
    GatedColumnParallelLinear,
    Norm,
    RowParallelLinear,
    Stream,
)
from distllm.parallel.vocab import VocabParallelEmbedding, VocabParallelHead

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Attention:
    """One layer's attention over this rank's heads."""

    qkv: ColumnParallelLinear
    out: RowParallelLinear
    num_heads: int  # of this rank, as is the next
    num_kv_heads: int
    head_dim: int

    def __call__(
        self,
        stream: Stream,
        next_norm: Norm,
        cos_sin: torch.Tensor,
        batch: TokenBatch,
        kv_cache_layer: torch.Tensor,
    ) -> Stream:
        heads = (self.num_heads, self.num_kv_heads, self.head_dim)
        q = rope_and_cache_kv(self.qkv(stream), cos_sin, batch, kv_cache_layer, *heads)
        mixed = paged_attention(q, kv_cache_layer, batch, self.head_dim**-0.5)
        return self.out(mixed, stream, next_norm)


@dataclass(frozen=True)
class GatedMLP:
    gate_up: GatedColumnParallelLinear
    down: RowParallelLinear

    def __call__(self, stream: Stream, next_norm: Norm | None) -> Stream:
        return self.down(self.gate_up(stream), stream, next_norm)


@dataclass(frozen=True)
class Layer:
    """Two blocks, each of which reads the residual stream through its norm and adds to it."""

    attn: Attention
    mlp: GatedMLP


class Decoder:
    """This rank's part of the model. weights: the tensors of shard_table(spec, layout), by name."""

    def __init__(self, spec: DecoderSpec, layout: RankLayout, weights: Weights, tp: TensorComm) -> None:
        assert (tp.size, tp.rank) == (layout.tp_size, layout.tp_rank), "tp communicator of another stage"
        self.spec, self.layout, self.tp = spec, layout, tp
        self.num_heads = _length(local_heads(spec, layout))
        self.num_kv_heads = _length(local_kv_heads(spec, layout))
        self.layers = [self._layer(weights, f"layers.{n}") for n in stage_layers(spec, layout)]
        device = self.layers[0].attn.qkv.weight.device
        self.frequencies = rope_frequencies(spec.rope, spec.head_dim).to(device)
        if layout.is_first_stage:
            self.embedding = VocabParallelEmbedding(weights[EMBED], tp)
        if layout.is_last_stage:
            norm = Norm(weights[FINAL_NORM], spec.norm_eps)
            self.head = VocabParallelHead(weights[head_name(spec)], norm, spec.vocab_size, tp)

    def _layer(self, weights: Weights, at: str) -> Layer:
        attn_norm = Norm(weights[f"{at}.attn_norm.weight"], self.spec.norm_eps)
        mlp_norm = Norm(weights[f"{at}.mlp_norm.weight"], self.spec.norm_eps)
        qkv, gate_up = _linear(weights, f"{at}.attn.qkv"), _linear(weights, f"{at}.mlp.gate_up")
        return Layer(
            attn=Attention(
                qkv=ColumnParallelLinear(*qkv, attn_norm),
                out=RowParallelLinear(*_linear(weights, f"{at}.attn.o"), self.tp),
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.spec.head_dim,
            ),
            mlp=GatedMLP(
                gate_up=GatedColumnParallelLinear(*gate_up, mlp_norm),
                down=RowParallelLinear(*_linear(weights, f"{at}.mlp.down"), self.tp),
            ),
        )

    def kv_cache_shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """[layers of this stage, keys and values, blocks, tokens, KV heads of this rank, head_dim].

        Allocate it filled with zeros: attention multiplies unwritten places by zero, and 0 · NaN is NaN.
        """
        return (len(self.layers), 2, num_blocks, block_size, self.num_kv_heads, self.spec.head_dim)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """First stage only. token_ids: [num_tokens] int. Returns [num_tokens, hidden_size].

        Collective: every rank of tp, one all_reduce.
        """
        return self.embedding(token_ids)

    def forward(self, hidden: torch.Tensor, batch: TokenBatch, kv_cache: torch.Tensor) -> torch.Tensor:
        """This stage's layers. hidden: [num_tokens, hidden_size], may be written over; returns the same
        shape.

        Writes the KV of the batch's tokens into kv_cache (kv_cache_shape). Collective: every rank of tp, two
        all_reduces per layer.
        """
        cos_sin = rope_cos_sin(self.frequencies, batch.positions)
        stream = Stream(hidden)
        next_norms = [layer.attn.qkv.norm for layer in self.layers[1:]] + [None]
        for layer, next_norm, kv_cache_layer in zip(self.layers, next_norms, kv_cache, strict=True):
            stream = layer.attn(stream, layer.mlp.gate_up.norm, cos_sin, batch, kv_cache_layer)
            stream = layer.mlp(stream, next_norm)
        return stream.hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last stage only. hidden: [num_rows, hidden_size], of the rows that sample.

        Returns [num_rows, vocab_size] in their dtype on every rank of tp. Collective: all of them, one
        all_gather.
        """
        return self.head.gather(self.head(hidden))


def _linear(weights: Weights, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    return weights[f"{name}.weight"], weights.get(f"{name}.bias")


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]
