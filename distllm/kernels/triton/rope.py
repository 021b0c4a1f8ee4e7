"""Norm and rotary embedding of q and k, and the write of k and v into the paged cache.

A program takes some heads of a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distllm.kernels.batch import TokenBatch
from distllm.kernels.reference.rope import QKNorm
from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs

HEADS = 8  # of one program


@triton.jit
def _rope_kernel(
    qkv, cos_sin, slot_mapping, q_gain, k_gain, eps, q_out, keys, values,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    STEP: tl.constexpr, APART: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Heads 0 … NUM_HEADS − 1 are q, then k, then v. Column STEP · i turns with the one APART after it, HALF
    pairs in all; the columns after those stay. BLOCK and BLOCK_REST: HALF and the number of columns that
    stay, rounded up to powers of two; 0 where all turn. Without a norm the gains are None.
    """
    wait_for_inputs()
    ALL: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    token, pairs = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)[None, :]
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    is_q, turns = head < NUM_HEADS, head < NUM_HEADS + NUM_KV_HEADS
    source = qkv + (token * ALL + head) * HEAD_DIM
    inside = (head < ALL) & (pairs < HALF)
    first, second = pairs * STEP, pairs * STEP + APART
    a = tl.load(source + first, mask=inside, other=0.0)
    b = tl.load(source + second, mask=inside, other=0.0)
    if BLOCK_REST:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        rest_inside = (head < ALL) & (rest < HEAD_DIM)
        c = tl.load(source + rest, mask=rest_inside, other=0.0)
    if q_gain is not None:
        squares = _squares(a) + _squares(b)
        if BLOCK_REST:
            squares += _squares(c)
        inverse = tl.rsqrt(squares / HEAD_DIM + eps)
        a = tl.where(turns, _normed(a, inverse, q_gain, k_gain, first, pairs < HALF, is_q), a)
        b = tl.where(turns, _normed(b, inverse, q_gain, k_gain, second, pairs < HALF, is_q), b)
        if BLOCK_REST:
            c = tl.where(turns, _normed(c, inverse, q_gain, k_gain, rest, rest < HEAD_DIM, is_q), c)
    cos = tl.load(cos_sin + token * 2 * HALF + pairs, mask=pairs < HALF)
    sin = tl.load(cos_sin + token * 2 * HALF + HALF + pairs, mask=pairs < HALF)
    key = tl.load(slot_mapping + token) * NUM_KV_HEADS + head - NUM_HEADS
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    a = tl.where(turns, (wide_a * cos - wide_b * sin).to(a.dtype), a)
    b = tl.where(turns, (wide_b * cos + wide_a * sin).to(b.dtype), b)
    q_out += (token * NUM_HEADS + head) * HEAD_DIM
    keys += key * HEAD_DIM
    values += (key - NUM_KV_HEADS) * HEAD_DIM
    _store(q_out, keys, values, first, a, inside, is_q, turns)
    _store(q_out, keys, values, second, b, inside, is_q, turns)
    if BLOCK_REST:
        _store(q_out, keys, values, rest, c, rest_inside, is_q, turns)


@triton.jit
def _squares(x):
    """The sum of a head."""
    return tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)[:, None]


@triton.jit
def _normed(x, inverse, q_gain, k_gain, columns, inside, is_q):
    q_part = tl.load(q_gain + columns, mask=inside, other=0.0)
    k_part = tl.load(k_gain + columns, mask=inside, other=0.0)
    gain = tl.where(is_q, q_part, k_part)
    rounded = (x.to(tl.float32) * inverse).to(gain.dtype)
    return (rounded.to(tl.float32) * gain.to(tl.float32)).to(x.dtype)


@triton.jit
def _store(q_out, keys, values, columns, x, inside, is_q, turns):
    """Each head where it belongs. q_out, keys, values: [HEADS, 1], where the head lies if it is one."""
    tl.store(q_out + columns, x, mask=inside & is_q)
    tl.store(keys + columns, x, mask=inside & turns & ~is_q)
    tl.store(values + columns, x, mask=inside & ~turns)


@triton.jit
def _cos_sin_kernel(frequencies, positions, out, multiplier, HALF: tl.constexpr, BLOCK: tl.constexpr):
    wait_for_inputs()
    token, pairs = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = pairs < HALF
    angle = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + pairs, mask=inside, other=0.0)
    tl.store(out + token * 2 * HALF + pairs, tl.cos(angle) * multiplier, mask=inside)
    tl.store(out + token * 2 * HALF + HALF + pairs, tl.sin(angle) * multiplier, mask=inside)


def rope_cos_sin(frequencies: torch.Tensor, positions: torch.Tensor, multiplier: float = 1.0) -> torch.Tensor:
    half = len(frequencies)
    out = torch.empty(len(positions), 2 * half, dtype=torch.float32, device=positions.device)
    if half:
        _cos_sin_kernel[(len(positions),)](
            frequencies, positions, out, float(multiplier), half, triton.next_power_of_2(half), num_warps=1,
            **OVERLAP,
        )  # fmt: skip
    return out


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
    num_tokens, rotary_dim = cos_sin.shape
    half, rest = rotary_dim // 2, head_dim - rotary_dim
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    _rope_kernel[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, HEADS))](
        qkv, cos_sin, batch.slot_mapping, *(qk_norm or (None, None, 0.0)), q, kv_cache_layer[0],
        kv_cache_layer[1], num_heads, num_kv_heads, head_dim, half, 2 if interleaved else 1,
        1 if interleaved else half, triton.next_power_of_2(max(1, half)), triton.next_power_of_2(rest), HEADS,
        num_warps=4, **OVERLAP,
    )  # fmt: skip
    return q
