"""A decoder layer: two blocks, each of which reads the residual stream through its norm and adds to it.

Knows parallel linears and kernels; never a spec or the names of weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distllm.kernels import expert_mlp, linear, paged_attention, rope_and_cache_kv, route
from distllm.kernels.batch import TokenBatch
from distllm.kernels.reference.rope import QKNorm
from distllm.parallel.linear import ColumnParallelLinear, PartialSum, RowParallelLinear
from distllm.parallel.stream import Norm, Stream


@dataclass(frozen=True)
class Attention:
    """One layer's attention over this rank's heads."""

    qkv: ColumnParallelLinear
    out: RowParallelLinear
    num_heads: int  # of this rank, as is the next
    num_kv_heads: int
    head_dim: int
    scale: float
    qk_norm: QKNorm | None
    interleaved: bool
    window: int
    softcap: float
    alibi_slopes: torch.Tensor | None  # [num_heads] fp32

    def mix(
        self, stream: Stream, cos_sin: torch.Tensor, batch: TokenBatch, kv_cache_layer: torch.Tensor
    ) -> torch.Tensor:
        """What `out` adds to the stream: [num_tokens, num_heads · head_dim]. No collective."""
        q = rope_and_cache_kv(
            self.qkv(stream),
            cos_sin,
            batch,
            kv_cache_layer,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            qk_norm=self.qk_norm,
            interleaved=self.interleaved,
        )
        return paged_attention(
            q,
            kv_cache_layer,
            batch,
            self.scale,
            window=self.window,
            softcap=self.softcap,
            alibi_slopes=self.alibi_slopes,
        )


@dataclass(frozen=True)
class MLP:
    """up includes the activation, and the gate where there is one."""

    up: ColumnParallelLinear
    out: RowParallelLinear

    @property
    def norm(self) -> Norm:
        return self.up.norm

    def mix(self, stream: Stream) -> torch.Tensor:
        """What `out` adds to the stream: [num_tokens, local width]. No collective."""
        return self.up(stream)


@dataclass(frozen=True)
class MoE:
    """Of every expert this rank's part of the inner features. The router is whole on every rank: what it
    reads has the same bits there, so that all choose the same experts.
    """

    norm: Norm
    router: torch.Tensor  # [num_experts, hidden_size]
    gate_up: torch.Tensor  # [num_experts, 2 · local width, hidden_size], gate rows first
    down: torch.Tensor  # [num_experts, hidden_size, local width]
    top_k: int
    renormalize: bool
    out: PartialSum

    def mix(self, stream: Stream) -> torch.Tensor:
        """What `out` adds to the stream: [num_tokens, hidden_size]. No collective."""
        stream = stream.through(self.norm)
        assert stream.normed is not None, "through() norms"
        # Logits in the weights' dtype and their softmax in fp32, as models were trained.
        shares, experts = route(linear(stream.normed, self.router), self.top_k, renormalize=self.renormalize)
        return expert_mlp(stream.normed, self.gate_up, self.down, shares, experts)


@dataclass(frozen=True)
class Layer:
    """The MLP, or the experts in its place, read what attention has added."""

    attn: Attention
    mlp: MLP | MoE
    rotation: int  # which of the step's tables of cosines and sines it uses

    @property
    def norm(self) -> Norm:
        """What reads the stream first."""
        return self.attn.qkv.norm

    def __call__(
        self,
        stream: Stream,
        cos_sin: torch.Tensor,
        batch: TokenBatch,
        kv_cache_layer: torch.Tensor,
        next_norm: Norm | None,
    ) -> Stream:
        """next_norm: of the layer behind, if there is one. Collective: two all_reduces of tp."""
        mixed = self.attn.mix(stream, cos_sin, batch, kv_cache_layer)
        stream = self.attn.out(mixed, stream, self.mlp.norm)
        return self.mlp.out(self.mlp.mix(stream), stream, next_norm)


@dataclass(frozen=True)
class ParallelLayer(Layer):
    """Both read the same stream, through one norm if they have the same."""

    def __call__(
        self,
        stream: Stream,
        cos_sin: torch.Tensor,
        batch: TokenBatch,
        kv_cache_layer: torch.Tensor,
        next_norm: Norm | None,
    ) -> Stream:
        shares = self.mlp.norm is self.norm
        stream = stream.through(self.norm) if shares else stream
        mixed = self.attn.mix(stream, cos_sin, batch, kv_cache_layer)
        inner = self.mlp.mix(stream if shares else Stream(stream.hidden))
        return self.mlp.out(inner, self.attn.out(mixed, stream), next_norm)
