"""A decoder as one would write it on paper, fp64, one sequence, no cache: what every knob must come to.

Written for the tests, from the definitions; shares no code with the decoder that it judges.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from distllm.models.moe_spec import MoESpec
from distllm.models.spec import DecoderSpec

Slots = dict[str, torch.Tensor]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x.clamp(min=0),
}


class PlainDecoder:
    """slots: by name, whole, in fp64. Ropes without scaling."""

    def __init__(self, spec: DecoderSpec, slots: Slots) -> None:
        self.spec, self.slots = spec, slots

    def logits(self, text: list[int]) -> torch.Tensor:
        """[len(text), vocab_size]."""
        spec, slots = self.spec, self.slots
        x = slots["embed.weight"][text] * spec.embedding_scale
        if spec.learned_positions is not None:
            x = x + slots["positions.weight"][spec.learned_positions :][: len(text)]
        if spec.embedding_norm:
            x = self.norm("embed_norm", x)
        for layer in range(spec.num_layers):
            x = self.layer(layer, x)
        head = slots["embed.weight" if spec.tied_embeddings else "head.weight"]
        if spec.normalized_head:
            head = head / head.norm(dim=1, keepdim=True)
        return capped(self.norm("final_norm", x) @ head.T * spec.logit_scale, spec.logit_softcap)

    def layer(self, n: int, x: torch.Tensor) -> torch.Tensor:
        at, kind = f"layers.{n}", self.spec.residual
        normed = self.norm(f"{at}.attn_norm", x)
        attn = self.attention(n, normed)
        attn = self.norm(f"{at}.attn_post_norm", attn) if self.spec.post_norms else attn
        if kind == "sequential":
            x, attn = x + attn, 0.0 * attn
        mlp = self.mlp(n, normed if kind == "parallel_shared" else self.norm(f"{at}.mlp_norm", x))
        mlp = self.norm(f"{at}.mlp_post_norm", mlp) if self.spec.post_norms else mlp
        return x + attn + mlp

    def attention(self, n: int, x: torch.Tensor) -> torch.Tensor:
        spec, at = self.spec, f"layers.{n}.attn"
        heads, group = spec.num_heads, spec.num_heads // spec.num_kv_heads
        q, k, v = (self.linear(f"{at}.{name}", x).view(len(x), -1, spec.head_dim) for name in "qkv")
        if spec.qk_norm:
            q, k = (self.rms(f"{at}.{name}_norm", part) for name, part in (("q", q), ("k", k)))
        q, k = self.rotated(n, q), self.rotated(n, k)
        out = torch.zeros(len(x), heads, spec.head_dim, dtype=torch.float64)
        window = spec.windows[n] if spec.windows else 0
        for i in range(len(x)):
            seen = range(max(0, i - window + 1) if window else 0, i + 1)
            for head in range(heads):
                keys, values = (part[seen.start : seen.stop, head // group] for part in (k, v))
                scale = spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
                scores = capped(keys @ q[i, head] * scale, spec.attention_softcap)
                if spec.alibi_scale is not None:
                    distance = torch.tensor([float(i - j) for j in seen])
                    scores = scores - spec.alibi_scale * slope(head, heads) * distance
                out[i, head] = scores.softmax(0) @ values
        return self.linear(f"{at}.o", out.flatten(1))

    def rotated(self, n: int, x: torch.Tensor) -> torch.Tensor:
        """As complex numbers."""
        spec = self.spec
        is_local = spec.window_rope is not None and spec.windows and spec.windows[n]
        rope = spec.window_rope if is_local else spec.rope
        if rope is None:
            return x
        dim = rope.rotary_dim or spec.head_dim
        angles = torch.arange(len(x))[:, None, None] * rope.theta ** (-torch.arange(0, dim, 2).double() / dim)
        turning = x[..., :dim]
        if rope.interleaved:
            turned = torch.view_as_complex(turning.reshape(*x.shape[:2], -1, 2)) * torch.exp(1j * angles)
            return torch.cat((torch.view_as_real(turned).flatten(2), x[..., dim:]), -1)
        turned = torch.complex(*turning.chunk(2, -1)) * torch.exp(1j * angles)
        return torch.cat((turned.real, turned.imag, x[..., dim:]), -1)

    def mlp(self, n: int, x: torch.Tensor) -> torch.Tensor:
        moe = self.spec.moe
        if moe is not None and n not in moe.dense_layers:
            return torch.stack([self.experts(n, moe, row) for row in x])
        return self.one_mlp(f"layers.{n}.mlp", x)

    def experts(self, n: int, moe: MoESpec, x: torch.Tensor) -> torch.Tensor:
        """Of one token."""
        likely = (self.slots[f"layers.{n}.moe.router.weight"] @ x).exp()
        shares = {e: float(likely[e] / likely.sum()) for e in range(moe.num_experts)}
        best = sorted(shares, key=lambda e: -shares[e])[: moe.top_k]
        total = sum(shares[e] for e in best) if moe.renormalize else 1.0
        parts = [shares[e] / total * self.one_mlp(f"layers.{n}.moe.experts.{e}", x) for e in best]
        return torch.stack(parts).sum(0)

    def one_mlp(self, at: str, x: torch.Tensor) -> torch.Tensor:
        activation = ACTIVATIONS[self.spec.activation]
        up = self.linear(f"{at}.up", x)
        up = activation(self.linear(f"{at}.gate", x)) * up if self.spec.gated else activation(up)
        return self.linear(f"{at}.down", up)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.slots[f"{name}.weight"].T + self.slots.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if self.spec.norm.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        return self.rms(name, x) + self.slots.get(f"{name}.bias", 0.0)

    def rms(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gain = self.slots[f"{name}.weight"] + (1.0 if self.spec.norm.plus_one else 0.0)
        return x / (x.square().mean(-1, keepdim=True) + self.spec.norm.eps).sqrt() * gain


def capped(x: torch.Tensor, cap: float) -> torch.Tensor:
    return cap * torch.tanh(x / cap) if cap else x


def slope(head: int, heads: int) -> float:
    """Of alibi: powers of 2^(−8/c) for the c heads of a power of two, those between for the rest."""
    power = 2 ** math.floor(math.log2(heads))
    if head < power:
        return 2.0 ** (-8.0 * (head + 1) / power)
    return 2.0 ** (-4.0 * (2 * (head - power) + 1) / power)
