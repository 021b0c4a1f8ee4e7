"""Typical sampling without a sort: one program a row.

A token's surprise less the entropy is the mean score less its own. How far from the mean tokens are kept is a
bisection over the distances that fp32 can hold, three pivots a pass, as in `triton.truncation`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs
from distllm.kernels.triton.online_softmax import LOG2E

BLOCK, NUM_WARPS = 4096, 16
LEAST = tl.constexpr(-1e38)  # finite: −inf − (−inf) would be no number


@triton.jit
def _scores(logits, start, vocab_size, rate, border, BLOCK: tl.constexpr):
    """−inf for what lies below the border."""
    entries = start + tl.arange(0, BLOCK)
    x = tl.load(logits + entries, mask=entries < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.where(x >= border, x * rate, float("-inf"))


@triton.jit
def _best_total_mean(logits, vocab_size, rate, border, BLOCK: tl.constexpr):
    """The best score, Σ exp(s − best), and the mean of s − best under the distribution."""
    best = tl.full([BLOCK], LEAST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    moment = total  # Σ exp(s − best) · (s − best)
    for start in range(0, vocab_size, BLOCK):
        s = _scores(logits, start, vocab_size, rate, border, BLOCK)
        better = tl.maximum(best, s)
        weight, shrink = tl.exp2((s - better) * LOG2E), tl.exp2((best - better) * LOG2E)
        moment = (moment + total * (best - better)) * shrink
        moment += tl.where(weight > 0, weight * (s - better), 0.0)
        total = total * shrink + weight
        best = better
    top = tl.max(best)
    shrink = tl.exp2((best - top) * LOG2E)
    mass = tl.sum(total * shrink)
    return top, mass, tl.sum((moment + total * (best - top)) * shrink) / mass


@triton.jit
def _masses_within(a, b, c, logits, vocab_size, rate, border, top, mean, BLOCK: tl.constexpr):
    """Σ exp(s − top) of the scores no farther from the mean than a, b, c."""
    within_a = tl.zeros([BLOCK], tl.float32)
    within_b, within_c = within_a, within_a
    for start in range(0, vocab_size, BLOCK):
        u = _scores(logits, start, vocab_size, rate, border, BLOCK) - top
        weight, distance = tl.exp2(u * LOG2E), tl.abs(u - mean)
        within_a += tl.where(distance <= a, weight, 0.0)
        within_b += tl.where(distance <= b, weight, 0.0)
        within_c += tl.where(distance <= c, weight, 0.0)
    return tl.sum(within_a), tl.sum(within_b), tl.sum(within_c)


@triton.jit
def _farthest(target, reach, logits, vocab_size, rate, border, top, mean, BLOCK: tl.constexpr):
    """The least distance from the mean within which the target's mass lies; reach must have it.

    Numbers that are not negative have the order of their bits. Each pass cuts what is left to a quarter: low
    has too little, high has enough.
    """
    low, high = tl.full([], -1, tl.int64), reach.to(tl.int32, bitcast=True).to(tl.int64)
    while high - low > 1:
        step = (high - low + 3) // 4
        a, b, c = _distance(low + step), _distance(low + 2 * step), _distance(low + 3 * step)
        a, b, c = _masses_within(a, b, c, logits, vocab_size, rate, border, top, mean, BLOCK)
        low += ((a < target).to(tl.int64) + (b < target).to(tl.int64) + (c < target).to(tl.int64)) * step
        high = tl.minimum(high, low + step)
    return _distance(high)


@triton.jit
def _distance(key):
    return key.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize_on_alignment=["temperature", "lowest", "typical_p"])
def _keep_typical_kernel(
    logits, temperature, lowest, typical_p, out, vocab_size, row_stride, BLOCK: tl.constexpr
):
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    logits, out = logits + row * row_stride, out + row * vocab_size
    heat, p = tl.load(temperature + row), tl.load(typical_p + row)
    asks = (heat > 0) & (p < 1)
    rate = tl.div_rn(1.0, tl.where(asks, heat, 1.0))
    border = tl.full([], float("-inf"), tl.float32)
    top, mean, farthest = tl.zeros([], tl.float32), tl.zeros([], tl.float32), -border
    if asks:
        if lowest is not None:
            border = tl.load(lowest + row)
        top, total, mean = _best_total_mean(logits, vocab_size, rate, border, BLOCK)
        # A whole vocabulary of scores farther below has less than half of what may be left out.
        below = mean + tl.log(vocab_size / (total * (1.0 - p))) + 1.0
        reach = tl.maximum(tl.abs(mean), below)
        target = tl.maximum(p * total, 1e-30)  # above 0, so that the nearest stays
        farthest = _farthest(target, reach, logits, vocab_size, rate, border, top, mean, BLOCK)
    for start in range(0, vocab_size, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        u = _scores(logits, start, vocab_size, rate, border, BLOCK) - top
        x = tl.load(logits + entries, mask=entries < vocab_size, other=0.0)
        kept = tl.where(tl.abs(u - mean) <= farthest, x, float("-inf"))
        tl.store(out + entries, kept, mask=entries < vocab_size)


def keep_typical(
    logits: torch.Tensor, temperature: torch.Tensor, lowest: torch.Tensor | None, typical_p: torch.Tensor
) -> torch.Tensor:
    num_rows, vocab_size = logits.shape
    out = logits.new_empty(num_rows, vocab_size)
    _keep_typical_kernel[(num_rows,)](
        logits, temperature, lowest, typical_p, out, vocab_size, logits.stride(0), BLOCK,
        num_warps=NUM_WARPS, **OVERLAP,
    )  # fmt: skip
    return out
