"""Rotary embedding of q and k and the write of k and v into the paged cache: one program a token and head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distllm.kernels.batch import TokenBatch


@triton.jit
def _rope_kernel(
    qkv, cos_sin, slot_mapping, q_out, keys, values,
    num_heads: tl.constexpr, num_kv_heads: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Heads 0 … num_heads − 1 are q, then k, then v. BLOCK is HALF rounded up to a power of two."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.arange(0, BLOCK)
    inside = first < HALF
    source = qkv + (token * (num_heads + 2 * num_kv_heads) + head) * HEAD_DIM
    a = tl.load(source + first, mask=inside)
    b = tl.load(source + HALF + first, mask=inside)
    if head < num_heads + num_kv_heads:
        cos = tl.load(cos_sin + token * HEAD_DIM + first, mask=inside)
        sin = tl.load(cos_sin + token * HEAD_DIM + HALF + first, mask=inside)
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        a = (wide_a * cos - wide_b * sin).to(a.dtype)
        b = (wide_b * cos + wide_a * sin).to(b.dtype)
    if head < num_heads:
        target = q_out + (token * num_heads + head) * HEAD_DIM
    else:
        place = tl.load(slot_mapping + token) * num_kv_heads
        if head < num_heads + num_kv_heads:
            target = keys + (place + head - num_heads) * HEAD_DIM
        else:
            target = values + (place + head - num_heads - num_kv_heads) * HEAD_DIM
    tl.store(target + first, a, mask=inside)
    tl.store(target + HALF + first, b, mask=inside)


@triton.jit
def _cos_sin_kernel(frequencies, positions, out, HALF: tl.constexpr, BLOCK: tl.constexpr):
    token, pairs = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = pairs < HALF
    angle = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + pairs, mask=inside, other=0.0)
    tl.store(out + token * 2 * HALF + pairs, tl.cos(angle), mask=inside)
    tl.store(out + token * 2 * HALF + HALF + pairs, tl.sin(angle), mask=inside)


def rope_cos_sin(frequencies: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    half = len(frequencies)
    out = torch.empty(len(positions), 2 * half, dtype=torch.float32, device=positions.device)
    _cos_sin_kernel[(len(positions),)](
        frequencies, positions, out, half, triton.next_power_of_2(half), num_warps=1
    )
    return out


def rope_and_cache_kv(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    batch: TokenBatch,
    kv_cache_layer: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> torch.Tensor:
    num_tokens, half = qkv.shape[0], head_dim // 2
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    _rope_kernel[(num_tokens, num_heads + 2 * num_kv_heads)](
        qkv, cos_sin, batch.slot_mapping, q, kv_cache_layer[0], kv_cache_layer[1],
        num_heads, num_kv_heads, head_dim, half, triton.next_power_of_2(half), num_warps=1,
    )  # fmt: skip
    return q
