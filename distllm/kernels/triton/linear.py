"""Linear layers for one token: memory-bound, so each weight is read once, at the speed of the memory, and whatever
stands before (RMSNorm) or behind (bias, residual, SiLU · up) rides along.

One program computes ROWS outputs over the whole width. The normalisation is linear in 1/rms: the sum of squares is
taken in the same pass, and the result scaled at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from distllm.kernels.triton.activation import silu_mul
from distllm.kernels.triton.norm import rms_norm


@triton.jit
def _gemv_kernel(
    x,
    weight,
    bias,
    gain,
    residual,
    out,
    num_out,
    width,
    eps,
    HAS_NORM: tl.constexpr,
    HAS_SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """With HAS_SILU weight holds gate rows, then up rows, num_out of each."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = rows < num_out
    columns = tl.arange(0, BLOCK_K)
    lines = weight + rows.to(tl.int64)[:, None] * width
    acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
    acc_up = tl.zeros([ROWS, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + columns
        inside = (k < width) | EVEN
        mask = present[:, None] & inside[None, :]
        w = tl.load(lines + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        if HAS_SILU:
            up = tl.load(
                lines + num_out.to(tl.int64) * width + k[None, :],
                mask=mask,
                other=0.0,
                eviction_policy="evict_first",
            )
        value = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += value * value
            value *= tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * value[None, :]
        if HAS_SILU:
            acc_up += up.to(tl.float32) * value[None, :]
    scale = 1.0
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(squares) / width + eps)
    y = tl.sum(acc, 1) * scale
    if HAS_BIAS:
        y += tl.load(bias + rows, mask=present, other=0.0).to(tl.float32)
    if HAS_SILU:
        gate_up = tl.sum(acc_up, 1) * scale
        if HAS_BIAS:
            gate_up += tl.load(bias + num_out + rows, mask=present, other=0.0).to(tl.float32)
        y = y / (1.0 + tl.exp(-y)) * gate_up
    if HAS_RESIDUAL:
        y += tl.load(residual + rows, mask=present, other=0.0).to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty), mask=present)


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token through (norm →) linear (→ silu(gate) · up) (→ + residual). x: [1, width]; weight: [rows, width].

    norm: gain and eps of an RMSNorm over x. gated: rows are gate, then up; the
    result has half as many.
    """
    num_out = weight.shape[0] // 2 if gated else weight.shape[0]
    width = weight.shape[1]
    out = torch.empty(1, num_out, dtype=x.dtype, device=x.device)
    rows = 1 if gated else 2
    block_k = min(2048, triton.next_power_of_2(width))
    gain, eps = norm if norm is not None else (None, 0.0)
    _gemv_kernel[(triton.cdiv(num_out, rows),)](
        x, weight, bias, gain, residual, out, num_out, width, eps, gain is not None, gated, bias is not None,
        residual is not None, rows, block_k, width % block_k == 0, num_warps=8 if block_k >= 2048 else 4,
    )  # fmt: skip
    return out


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
) -> torch.Tensor:
    if x.shape[0] == 1:
        return gemv(x, weight, bias, norm=norm)
    return F.linear(x if norm is None else rms_norm(x, *norm), weight, bias)


def linear_silu_mul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
) -> torch.Tensor:
    if x.shape[0] == 1:
        return gemv(x, weight, bias, norm=norm, gated=True)
    return silu_mul(F.linear(x if norm is None else rms_norm(x, *norm), weight, bias))


def linear_add(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    if x.shape[0] == 1:
        return gemv(x, weight, bias, residual=residual)
    residual.addmm_(x, weight.T)  # the addition rides in the product's epilogue
    return residual if bias is None else residual.add_(bias)
