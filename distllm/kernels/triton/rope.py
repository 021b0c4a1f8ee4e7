"""Rotary embedding of q and k and the write of k and v into the paged cache: some heads a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distllm.kernels.batch import TokenBatch
from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs

HEADS = 8  # of one program


@triton.jit
def _rope_kernel(
    qkv, cos_sin, slot_mapping, q_out, keys, values,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Heads 0 … NUM_HEADS − 1 are q, then k, then v. BLOCK is HALF rounded up to a power of two."""
    wait_for_inputs()
    ALL: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    token, pairs = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    inside = (head < ALL) & (pairs < HALF)[None, :]
    source = qkv + (token * ALL + head) * HEAD_DIM + pairs[None, :]
    a = tl.load(source, mask=inside)
    b = tl.load(source + HALF, mask=inside)
    cos = tl.load(cos_sin + token * HEAD_DIM + pairs, mask=pairs < HALF)[None, :]
    sin = tl.load(cos_sin + token * HEAD_DIM + HALF + pairs, mask=pairs < HALF)[None, :]
    place = tl.load(slot_mapping + token) * NUM_KV_HEADS
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    turns = head < NUM_HEADS + NUM_KV_HEADS
    a = tl.where(turns, (wide_a * cos - wide_b * sin).to(a.dtype), a)
    b = tl.where(turns, (wide_b * cos + wide_a * sin).to(b.dtype), b)
    _store(
        q_out + (token * NUM_HEADS + head) * HEAD_DIM + pairs[None, :],
        a,
        b,
        inside & (head < NUM_HEADS),
        HALF,
    )
    key = place + head - NUM_HEADS
    is_key = inside & (head >= NUM_HEADS) & turns
    _store(keys + key * HEAD_DIM + pairs[None, :], a, b, is_key, HALF)
    _store(values + (key - NUM_KV_HEADS) * HEAD_DIM + pairs[None, :], a, b, inside & ~turns, HALF)


@triton.jit
def _store(target, a, b, mask, HALF: tl.constexpr):
    tl.store(target, a, mask=mask)
    tl.store(target + HALF, b, mask=mask)


@triton.jit
def _cos_sin_kernel(frequencies, positions, out, HALF: tl.constexpr, BLOCK: tl.constexpr):
    wait_for_inputs()
    token, pairs = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = pairs < HALF
    angle = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + pairs, mask=inside, other=0.0)
    tl.store(out + token * 2 * HALF + pairs, tl.cos(angle), mask=inside)
    tl.store(out + token * 2 * HALF + HALF + pairs, tl.sin(angle), mask=inside)


def rope_cos_sin(frequencies: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    half = len(frequencies)
    out = torch.empty(len(positions), 2 * half, dtype=torch.float32, device=positions.device)
    _cos_sin_kernel[(len(positions),)](
        frequencies, positions, out, half, triton.next_power_of_2(half), num_warps=1, **OVERLAP
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
    _rope_kernel[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, HEADS))](
        qkv, cos_sin, batch.slot_mapping, q, kv_cache_layer[0], kv_cache_layer[1],
        num_heads, num_kv_heads, head_dim, half, triton.next_power_of_2(half), HEADS, num_warps=4, **OVERLAP,
    )  # fmt: skip
    return q
