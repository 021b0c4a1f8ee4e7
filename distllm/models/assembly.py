"""From a spec and the tensors of one rank to the layers and ends of a decoder. Used by `decoder.py` alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from distllm.comm.base import TensorComm
from distllm.kernels.reference.rope import QKNorm
from distllm.models.alibi import alibi_slopes
from distllm.models.layers import MLP, Attention, Layer, MoE, ParallelLayer
from distllm.models.moe_spec import MoESpec
from distllm.models.rope_spec import RopeSpec
from distllm.models.shards import head_name, layer_linears, local_heads, local_kv_heads, stage_layers
from distllm.models.spec import DecoderSpec, NormSpec
from distllm.parallel.layout import RankLayout
from distllm.parallel.linear import (
    ActivatedColumnParallelLinear,
    ColumnParallelLinear,
    GatedColumnParallelLinear,
    PartialSum,
    RowParallelLinear,
)
from distllm.parallel.sharding import Span
from distllm.parallel.stream import LayerNorm, Norm, RMSNorm
from distllm.parallel.vocab import VocabParallelHead

Weights = dict[str, torch.Tensor]


def make_layers(
    spec: DecoderSpec,
    layout: RankLayout,
    weights: Weights,
    tp: TensorComm,
    ropes: Sequence[RopeSpec | None],
) -> list[Layer]:
    """The layers of a stage. ropes: all that they use; a layer holds the number of its own."""
    slopes = _slopes(spec, local_heads(spec, layout), weights)
    return [
        _LayerMaker(spec, layout, weights, tp, n).make(ropes.index(spec.layer_rope(n)), slopes)
        for n in stage_layers(spec, layout)
    ]


def make_embedding_norm(spec: DecoderSpec, weights: Weights) -> Norm | None:
    return _norm(spec.norm, weights, "embed_norm") if spec.embedding_norm else None


def make_head(spec: DecoderSpec, weights: Weights, tp: TensorComm) -> VocabParallelHead:
    weight, norm = weights[head_name(spec)], _norm(spec.norm, weights, "final_norm")
    if spec.normalized_head:
        # Once, here: checkpoints and engines hold the rows as they were trained. Padding stays zero.
        weight.copy_(F.normalize(weight.float(), dim=-1))
    return VocabParallelHead(weight, norm, spec.vocab_size, tp, spec.logit_scale, spec.logit_softcap)


@dataclass(frozen=True)
class _LayerMaker:
    spec: DecoderSpec
    layout: RankLayout
    weights: Weights
    tp: TensorComm
    layer: int

    def make(self, rotation: int, slopes: torch.Tensor | None) -> Layer:
        attn = self._attention(slopes)
        if self.spec.residual == "sequential":
            return Layer(attn, self._mlp(self._norm("mlp_norm")), rotation)
        shared = self.spec.residual == "parallel_shared"
        return ParallelLayer(attn, self._mlp(attn.qkv.norm if shared else self._norm("mlp_norm")), rotation)

    def _attention(self, slopes: torch.Tensor | None) -> Attention:
        spec, rope = self.spec, self.spec.layer_rope(self.layer)
        qkv, out = layer_linears(spec, self.layer)[:2]
        return Attention(
            qkv=ColumnParallelLinear(*self._linear(qkv), self._norm("attn_norm")),
            out=self._row(out, "attn_post_norm"),
            num_heads=_length(local_heads(spec, self.layout)),
            num_kv_heads=_length(local_kv_heads(spec, self.layout)),
            head_dim=spec.head_dim,
            scale=spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale,
            qk_norm=self._qk_norm() if spec.qk_norm else None,
            interleaved=rope is not None and rope.interleaved,
            window=spec.window(self.layer),
            softcap=spec.attention_softcap,
            alibi_slopes=slopes,
        )

    def _mlp(self, norm: Norm) -> MLP | MoE:
        moe = self.spec.layer_moe(self.layer)
        return self._dense(norm) if moe is None else self._experts(norm, moe)

    def _dense(self, norm: Norm) -> MLP:
        up, down = layer_linears(self.spec, self.layer)[2:]
        kind = GatedColumnParallelLinear if self.spec.gated else ActivatedColumnParallelLinear
        return MLP(kind(*self._linear(up), norm, self.spec.activation), self._row(down, "mlp_post_norm"))

    def _experts(self, norm: Norm, moe: MoESpec) -> MoE:
        router, gate_up, down = (self._linear(f"moe.{name}")[0] for name in ("router", "gate_up", "down"))
        return MoE(norm, router, gate_up, down, moe.top_k, moe.renormalize, self._sum("mlp_post_norm"))

    def _row(self, name: str, post_norm: str) -> RowParallelLinear:
        weight, bias = self._linear(name)
        return RowParallelLinear(weight, self._sum(post_norm, bias))

    def _sum(self, post_norm: str, bias: torch.Tensor | None = None) -> PartialSum:
        return PartialSum(self.tp, bias, self._norm(post_norm) if self.spec.post_norms else None)

    def _linear(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        at = f"layers.{self.layer}.{name}"
        return self.weights[f"{at}.weight"], self.weights.get(f"{at}.bias")

    def _norm(self, name: str) -> Norm:
        return _norm(self.spec.norm, self.weights, f"layers.{self.layer}.{name}")

    def _qk_norm(self) -> QKNorm:
        at = f"layers.{self.layer}.attn"
        q, k = (_gain(self.spec.norm, self.weights[f"{at}.{name}_norm.weight"]) for name in "qk")
        return q, k, self.spec.norm.eps


def _norm(norm: NormSpec, weights: Weights, name: str) -> Norm:
    gain = _gain(norm, weights[f"{name}.weight"])
    if norm.kind == "rms":
        return RMSNorm(gain, norm.eps)
    return LayerNorm(gain, weights[f"{name}.bias"], norm.eps)


def _gain(norm: NormSpec, weight: torch.Tensor) -> torch.Tensor:
    return 1 + weight.float() if norm.plus_one else weight


def _slopes(spec: DecoderSpec, heads: Span, weights: Weights) -> torch.Tensor | None:
    """Of this rank's heads."""
    if spec.alibi_scale is None:
        return None
    device = next(iter(weights.values())).device
    return (alibi_slopes(spec.num_heads)[slice(*heads)] * spec.alibi_scale).to(device)


def _length(span: Span) -> int:
    return span[1] - span[0]
