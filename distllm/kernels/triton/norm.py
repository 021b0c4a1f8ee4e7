"""RMSNorm, alone and fused with the residual addition before it, and LayerNorm: one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, out, total, width, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)  # no kernel of a step writes it
    wait_for_inputs()
    dtype = out.dtype.element_ty
    wide = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        # Rounded to the storage type before it is squared, as a sum kept in that type would be.
        stored = (wide + tl.load(residual + row + columns, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        tl.store(total + row + columns, stored, mask=inside)
        wide = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / width + eps)
    rounded = (wide * scale).to(weight.dtype.element_ty).to(tl.float32)
    tl.store(out + row + columns, (rounded * gain).to(dtype), mask=inside)


@triton.jit
def _layer_norm_kernel(x, weight, bias, out, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs()
    wide = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
    centered = tl.where(inside, wide - tl.sum(wide) / width, 0.0)
    scale = tl.rsqrt(tl.sum(centered * centered) / width + eps)
    y = centered * scale * gain + offset
    tl.store(out + row + columns, y.to(out.dtype.element_ty), mask=inside)


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[-1]
    out = torch.empty_like(x)
    total = torch.empty_like(x) if residual is not None else x
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(x.shape[0],)](
        x,
        residual,
        weight,
        out,
        total,
        width,
        eps,
        residual is not None,
        block,
        num_warps=_num_warps(block),
        **OVERLAP,
    )
    return out, total


def _num_warps(block: int) -> int:
    return max(4, min(16, block // 512))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _launch(x, None, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch(x, residual, weight, eps)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    out, block = torch.empty_like(x), triton.next_power_of_2(x.shape[-1])
    _layer_norm_kernel[(x.shape[0],)](
        x, weight, bias, out, x.shape[-1], eps, block, num_warps=_num_warps(block), **OVERLAP
    )
    return out
