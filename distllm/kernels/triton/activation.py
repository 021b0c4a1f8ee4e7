"""Activations of an MLP, plain or as the gate of another half: one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs

BLOCK, NUM_WARPS = 2048, 8


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """x: fp32."""
    if KIND == "silu":
        return x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # 1 + tanh(u) = 2 · sigmoid(2u)
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(KIND == "relu")
        return tl.maximum(x, 0.0)


@triton.jit
def _activation_kernel(x, out, width, KIND: tl.constexpr, GATES: tl.constexpr, BLOCK: tl.constexpr):
    """With GATES a row of x holds width gates, then what they gate."""
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    dtype = out.dtype.element_ty
    x += row * width * (2 if GATES else 1)
    y = _activation(tl.load(x + columns, mask=inside, other=0.0).to(tl.float32), KIND)
    if GATES:
        up = tl.load(x + width + columns, mask=inside, other=0.0).to(tl.float32)
        y = y.to(dtype).to(tl.float32) * up
    tl.store(out + row * width + columns, y.to(dtype), mask=inside)


def _launch(x: torch.Tensor, width: int, activation: str) -> torch.Tensor:
    out = x.new_empty(x.shape[0], width)
    block = min(BLOCK, triton.next_power_of_2(width))
    grid = (x.shape[0], triton.cdiv(width, block))
    gates = width != x.shape[1]
    _activation_kernel[grid](x, out, width, activation, gates, block, num_warps=NUM_WARPS, **OVERLAP)
    return out


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    return _launch(x, x.shape[1], activation)


def activate_mul(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    return _launch(gate_up, gate_up.shape[1] // 2, activation)
