"""Linear layers for one token: memory-bound, so each weight is read once, at the speed of the memory, and
whatever stands before (RMSNorm) or behind (bias, residual, SiLU · up) rides along.

One program computes ROWS outputs over the whole width. The normalisation is linear in 1/rms: the sum of
squares is taken in the same pass, and the result scaled at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from distllm.kernels.triton.activation import activate_mul
from distllm.kernels.triton.gated_linear import try_gated_linear
from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs
from distllm.kernels.triton.norm import rms_norm


@triton.jit
def _load(pointers, inside, WHOLE: tl.constexpr, EVICTION: tl.constexpr):
    if WHOLE:
        return tl.load(pointers, eviction_policy=EVICTION)
    else:
        return tl.load(pointers, mask=inside, other=0.0, eviction_policy=EVICTION)


@triton.jit
def _gemv_kernel(
    x, weight, bias, gain, residual, out, num_out, eps,
    HAS_NORM: tl.constexpr, HAS_SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """With HAS_SILU weight holds gate rows, then up rows, num_out of each."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = rows < num_out
    columns = tl.arange(0, BLOCK_K)
    # Rows past the end read the last one again: loads need no mask, and nothing of it is stored.
    lines = weight + tl.minimum(rows, num_out - 1).to(tl.int64)[:, None] * WIDTH
    up_lines = lines + num_out.to(tl.int64) * WIDTH
    acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
    acc_up = tl.zeros([ROWS, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.static_range(
        0, WIDTH, BLOCK_K
    ):  # unrolled: loads of several blocks are under way at once
        k = start + columns
        w = _load(lines + k[None, :], k[None, :] < WIDTH, start + BLOCK_K <= WIDTH, "evict_first")
        if HAS_SILU:
            w_up = _load(up_lines + k[None, :], k[None, :] < WIDTH, start + BLOCK_K <= WIDTH, "evict_first")
        if start == 0:
            wait_for_inputs()  # the weights are there already
        value = _load(x + k, k < WIDTH, start + BLOCK_K <= WIDTH, "").to(tl.float32)
        if HAS_NORM:
            squares += value * value
            value *= _load(gain + k, k < WIDTH, start + BLOCK_K <= WIDTH, "").to(tl.float32)
        acc += w.to(tl.float32) * value[None, :]
        if HAS_SILU:
            acc_up += w_up.to(tl.float32) * value[None, :]
    scale = 1.0
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(squares) / WIDTH + eps)
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


def _tiling(width: int, normed: bool, gated: bool) -> tuple[int, int, int]:
    """(rows of a program, columns at a time, warps): the fastest of some sixty, see docs/gpu.md."""
    rows, block_k, num_warps = (1, 1024, 4) if gated else (2, 1024, 2) if normed else (4, 2048, 8)
    return rows, min(block_k, triton.next_power_of_2(width)), num_warps


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token through (norm →) linear (→ silu(gate) · up) (→ + residual). x: [1, width]; weight: [rows,
    width].

    norm: gain and eps of an RMSNorm over x. gated: rows are gate, then up; the result has half as many.
    residual: added to, in place, and returned.
    """
    num_out = weight.shape[0] // 2 if gated else weight.shape[0]
    width = weight.shape[1]
    rows, block_k, num_warps = _tiling(width, norm is not None, gated)
    out = torch.empty(1, num_out, dtype=x.dtype, device=x.device) if residual is None else residual
    gain, eps = norm if norm is not None else (None, 0.0)
    _gemv_kernel[(triton.cdiv(num_out, rows),)](
        x, weight, bias, gain, residual, out, num_out, eps, gain is not None, gated, bias is not None,
        residual is not None, width, rows, block_k, num_warps=num_warps, **OVERLAP,
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


def linear_activate_mul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
) -> torch.Tensor:
    if activation == "silu" and x.shape[0] == 1:
        return gemv(x, weight, bias, norm=norm, gated=True)
    if activation == "silu" and bias is None:
        x, norm = (x if norm is None else rms_norm(x, *norm)), None
        fused = try_gated_linear(x, weight)
        if fused is not None:
            return fused
    return activate_mul(linear(x, weight, bias, norm=norm), activation)


def linear_add(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    if x.shape[0] == 1:
        return gemv(x, weight, bias, residual=residual)
    residual.addmm_(x, weight.T)  # the addition rides in the product's epilogue
    return residual if bias is None else residual.add_(bias)
