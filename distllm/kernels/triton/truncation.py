"""The border that min_p, top_k and top_p set on a row's logits, found without a sort: one program a row.

top_k wants the largest logit with k entries or more at or above it, top_p the largest with enough mass there.
Both are bisections over the values that the dtype can hold, three pivots a pass, and the passes read the row
from the L2 cache. A row's border does not depend on its batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs
from distllm.kernels.triton.online_softmax import LOG2E
from distllm.kernels.triton.ordered import ordered

BLOCK, NUM_WARPS = 4096, 16
# Low bits of an fp32 number that are zero in every value of the dtype.
UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@triton.jit
def _key(value, SHIFT: tl.constexpr):
    return ordered(value.to(tl.int32, bitcast=True) >> SHIFT, SHIFT).to(tl.int64)


@triton.jit
def _value(key, SHIFT: tl.constexpr):
    return (ordered(key.to(tl.int32), SHIFT) << SHIFT).to(tl.float32, bitcast=True)


@triton.jit
def _block(logits, start, vocab_size, BLOCK: tl.constexpr):
    entries = start + tl.arange(0, BLOCK)
    return tl.load(logits + entries, mask=entries < vocab_size, other=float("-inf")).to(tl.float32)


@triton.jit
def _sums_from(a, b, c, logits, vocab_size, best, rate, WEIGHED: tl.constexpr, BLOCK: tl.constexpr):
    """The mass, Σ 2^((x − best) · rate), of the logits x ≥ a, ≥ b, ≥ c; without WEIGHED, their number."""
    above_a = tl.zeros([BLOCK], tl.float32)
    above_b, above_c = above_a, above_a
    for start in range(0, vocab_size, BLOCK):
        x = _block(logits, start, vocab_size, BLOCK)
        weight = tl.exp2((x - best) * rate) if WEIGHED else 1.0
        above_a += tl.where(x >= a, weight, 0.0)
        above_b += tl.where(x >= b, weight, 0.0)
        above_c += tl.where(x >= c, weight, 0.0)
    return tl.sum(above_a), tl.sum(above_b), tl.sum(above_c)


@triton.jit
def _largest_with(
    target, floor, logits, vocab_size, best, rate, WEIGHED: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest logit that has the target's mass or number (above 0) at or above it; floor must have it.

    Each pass cuts the keys that are left to a quarter. low has enough, high has not.
    """
    low, high = _key(floor, SHIFT), _key(best, SHIFT) + 1
    while high - low > 1:
        step = (high - low + 3) // 4
        a, b, c = _value(low + step, SHIFT), _value(low + 2 * step, SHIFT), _value(low + 3 * step, SHIFT)
        a, b, c = _sums_from(a, b, c, logits, vocab_size, best, rate, WEIGHED, BLOCK)
        passed = (a >= target).to(tl.int64) + (b >= target).to(tl.int64) + (c >= target).to(tl.int64)
        low += passed * step
        high = tl.minimum(high, low + step)
    return _value(low, SHIFT)


@triton.jit(do_not_specialize_on_alignment=["temperature", "top_k", "top_p", "min_p"])
def _lowest_kept_kernel(
    logits, temperature, top_k, top_p, min_p, out, vocab_size, row_stride, SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    wait_for_inputs()
    row = tl.program_id(0)
    heat, k = tl.load(temperature + row), tl.load(top_k + row)
    p, share = tl.load(top_p + row), tl.load(min_p + row)
    limited = (k > 0) & (k < vocab_size)
    lowest = tl.full([], float("-inf"), tl.float32)
    if (heat > 0) & (limited | (p < 1) | (share > 0)):
        logits += row.to(tl.int64) * row_stride
        lanes = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            lanes = tl.maximum(lanes, _block(logits, start, vocab_size, BLOCK))
        best, rate = tl.max(lanes), LOG2E / heat
        lowest = best + heat * tl.log(share)
        if limited:
            # BLOCK entries or more are no smaller than the least of the lanes' best.
            floor = tl.where(k <= BLOCK, tl.maximum(lowest, tl.min(lanes)), lowest)
            kth = _largest_with(k.to(tl.float32), floor, logits, vocab_size, best, rate, False, SHIFT, BLOCK)
            lowest = tl.maximum(lowest, kth)
        if p < 1:
            total, _, _ = _sums_from(lowest, best, best, logits, vocab_size, best, rate, True, BLOCK)
            # A whole vocabulary of logits below this has less than 1 − p of the mass of the best alone.
            floor = tl.maximum(lowest, best + heat * (tl.log((1.0 - p) / vocab_size) - 1.0))
            lowest = _largest_with(p * total, floor, logits, vocab_size, best, rate, True, SHIFT, BLOCK)
    tl.store(out + row, lowest)


def lowest_kept(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    num_rows, vocab_size = logits.shape
    out = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    _lowest_kept_kernel[(num_rows,)](
        logits, temperature, top_k, top_p, min_p, out, vocab_size, logits.stride(0),
        UNUSED_BITS[logits.dtype], BLOCK, num_warps=NUM_WARPS, **OVERLAP,
    )  # fmt: skip
    return out
