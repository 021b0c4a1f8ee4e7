"""The gate of a gated MLP: one pass over both halves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs

BLOCK, NUM_WARPS = 2048, 8


@triton.jit
def _silu_mul_kernel(gate_up, out, width, BLOCK: tl.constexpr):
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    gated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * width + columns, (gated * up).to(dtype), mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, width)
    block = min(BLOCK, triton.next_power_of_2(width))
    grid = (num_tokens, triton.cdiv(width, block))
    _silu_mul_kernel[grid](gate_up, out, width, block, num_warps=NUM_WARPS, **OVERLAP)
    return out
