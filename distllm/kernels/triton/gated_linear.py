"""The gate and up projections of many tokens with SiLU · up in their epilogue: compute-bound.

A tile is some tokens × some gate columns and the same up columns: the product that cuBLAS would write and
another kernel read again, twice as wide as the result, never reaches memory. Persistent programs, tiles
fetched by the tensor memory accelerator. Where it beats cuBLAS followed by activate_mul: docs/gpu.md.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs

GROUP = tl.constexpr(
    8
)  # tiles of tokens that share the same columns of the weights while these are in the cache


class Tiling(NamedTuple):
    tokens: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


MANY = Tiling(128, 128, 64, 8, 3)  # measured on an H100: 1024 tokens and more
SOME = Tiling(128, 64, 128, 4, 3)  # 65 to 128


# A prompt of an odd length must not wait for a kernel of its own to be compiled.
@triton.jit(do_not_specialize=["num_tokens"])
def _gated_kernel(
    x, weight, out, num_tokens, num_out, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """weight: gate rows, then up rows, num_out of each. What a tile reads beyond an edge is not stored."""
    wait_for_inputs()
    num_m, num_n = tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(num_out, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        first_m = tile // (GROUP * num_n) * GROUP
        rows = tl.minimum(num_m - first_m, GROUP)
        place = tile - first_m * num_n
        m, n = (first_m + place % rows) * BLOCK_M, place // rows * BLOCK_N
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, width, BLOCK_K):
            tokens = x.load([m, k])
            gate = tl.dot(tokens, weight.load([n, k]).T, gate)
            up = tl.dot(tokens, weight.load([num_out + n, k]).T, up)
        out.store([m, n], (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype))


def try_gated_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """silu(x Wᵀ's first half) · its second half, or None where cuBLAS is faster or the memory is not aligned.

    x: [num_tokens, width]; weight: [2 · num_out, width]; both contiguous.
    """
    tiling = _tiling(x.shape[0], weight.shape[0] // 2)
    if tiling is None or x.dtype not in (torch.bfloat16, torch.float16) or not _is_aligned(x, weight):
        return None
    return gated_linear(x, weight, tiling)


def gated_linear(x: torch.Tensor, weight: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    (num_tokens, width), num_out = x.shape, weight.shape[0] // 2
    out = x.new_empty(num_tokens, num_out)
    m, n, k, num_warps, num_stages = tiling
    num_tiles = triton.cdiv(num_tokens, m) * triton.cdiv(num_out, n)
    _gated_kernel[(min(num_tiles, _num_multiprocessors(x.device)),)](
        TensorDescriptor.from_tensor(x, [m, k]), TensorDescriptor.from_tensor(weight, [n, k]),
        TensorDescriptor.from_tensor(out, [m, n]), num_tokens, num_out, width, m, n, k, GROUP,
        num_warps=num_warps, num_stages=num_stages, **OVERLAP,
    )  # fmt: skip
    return out


def _tiling(num_tokens: int, num_out: int) -> Tiling | None:
    """None where tiles are too few for the device, or cuBLAS's own cut them better."""
    if num_tokens >= 1024:
        return MANY
    return SOME if 64 < num_tokens <= SOME.tokens and num_out >= 8192 else None


def _is_aligned(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Rows of whole 16 bytes, as the tensor memory accelerator wants them, of what is read and written."""
    widths = (x.shape[1], weight.shape[0] // 2)
    return all(width * x.itemsize % 16 == 0 for width in widths) and x.data_ptr() % 16 == 0


@cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # the interpreter: more than one, so that tiles are shared out
    return torch.cuda.get_device_properties(device).multi_processor_count
