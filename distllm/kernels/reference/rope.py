"""From qkv to attention's inputs: norm and rotary embedding of q and k, and the KV cache's writer.

One operation, since k passes once.
"""

from __future__ import annotations

import torch

from distllm.kernels.batch import TokenBatch

QKNorm = tuple[torch.Tensor, torch.Tensor, float]  # gains of q and of k, [head_dim] each; eps


def rope_cos_sin(frequencies: torch.Tensor, positions: torch.Tensor, multiplier: float = 1.0) -> torch.Tensor:
    """Cosines, then sines, of each token: [num_tokens, rotary_dim] fp32, for rotary_dim / 2 frequencies.

    positions: [num_tokens] int64. multiplier: of both (yarn and longrope stretch q and k by it).
    """
    angles = positions[:, None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * multiplier


def rope_and_cache_kv(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    batch: TokenBatch,
    kv_cache_layer: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    qk_norm: QKNorm | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """Norm and rotate q and k, write k and v where batch.slot_mapping says, return q [num_tokens, num_heads,
    head_dim], contiguous.

    qkv: [num_tokens, (num_heads + 2 · num_kv_heads) · head_dim]. kv_cache_layer: [2, num_blocks, block_size,
    num_kv_heads, head_dim], keys then values; changed in place.

    qk_norm: x / sqrt(mean(x²) + eps) · gain of each head, before the rotation; computed in fp32, rounded to
    the gain's dtype before the gain, to x's after it. cos_sin: [num_tokens, rotary_dim] fp32, the cosines of
    rotary_dim / 2 pairs, then their sines; 0 ≤ rotary_dim ≤ head_dim, even, and the rest of a head stays as
    it is. A pair is x[i] and x[i + rotary_dim / 2]; interleaved, x[2i] and x[2i + 1]. The rotation is done in
    fp32.
    """
    heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if qk_norm is not None:
        q_gain, k_gain, eps = qk_norm
        q, k = _norm(q, q_gain, eps), _norm(k, k_gain, eps)
    keys, values = kv_cache_layer.flatten(1, 2)
    keys[batch.slot_mapping] = _rotate(k, cos_sin, interleaved).to(keys.dtype)
    values[batch.slot_mapping] = v.to(values.dtype)
    return _rotate(q, cos_sin, interleaved)


def _norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed.to(gain.dtype) * gain).to(x.dtype)


def _rotate(x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x: [num_tokens, heads, head_dim]."""
    rotary_dim = cos_sin.shape[1]
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    turning, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    pair = -1 if interleaved else -2  # the dimension of length 2
    shape = (rotary_dim // 2, 2) if interleaved else (2, rotary_dim // 2)
    pairs = turning.float().reshape(*x.shape[:-1], *shape)
    first, second = pairs.unbind(pair)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=pair)
    return torch.cat((turned.flatten(-2).to(x.dtype), rest), dim=-1)
