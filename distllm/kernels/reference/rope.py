"""Rotary position embedding of q and k, and the KV cache's writer: one operation, since k passes once."""

from __future__ import annotations

import torch

from distllm.kernels.batch import TokenBatch


def rope_cos_sin(frequencies: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Cosines, then sines, of each token: [num_tokens, head_dim] fp32. positions: [num_tokens] int64."""
    angles = positions[:, None].float() * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rope_and_cache_kv(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    batch: TokenBatch,
    kv_cache_layer: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> torch.Tensor:
    """Rotate q and k, write k and v where batch.slot_mapping says, return q [num_tokens, num_heads,
    head_dim], contiguous.

    qkv: [num_tokens, (num_heads + 2 · num_kv_heads) · head_dim]. cos_sin: [num_tokens, head_dim] fp32, the
    cosines of the first half of a head, then its sines; x[i] turns with x[i + head_dim / 2]. The rotation
    is done in fp32. kv_cache_layer: [2, num_blocks, block_size, num_kv_heads, head_dim], keys then values;
    changed in place.
    """
    heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
    rotated = _rotate(heads[:, : num_heads + num_kv_heads], cos_sin)
    keys, values = kv_cache_layer.flatten(1, 2)
    keys[batch.slot_mapping] = rotated[:, num_heads:].to(keys.dtype)
    values[batch.slot_mapping] = heads[:, num_heads + num_kv_heads :].to(values.dtype)
    return rotated[:, :num_heads].contiguous()


def _rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """x: [num_tokens, heads, head_dim]."""
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
