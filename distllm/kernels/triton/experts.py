"""The experts of a mixture as two grouped products: rows sorted by expert, tiles of one expert's each.

Which expert a tile belongs to is found by bisecting where the experts' rows begin, so the host knows no
counts and a step can be captured. Each pair of token and expert has a row of its own up to the last sum: no
atomics, so the same call gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs


class Tiling(NamedTuple):
    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


FEW = Tiling(16, 64, 128, 4, 4)  # rows of an expert on average: the weights' bytes bound it
MANY = Tiling(64, 128, 64, 8, 3)


@triton.jit
def _find_expert(starts, tile, num_experts, BLOCK_M: tl.constexpr):
    """Expert e's tiles begin at starts[e] // BLOCK_M + e: monotonic, and at most one idle tile an expert."""
    low, high = 0, num_experts
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // BLOCK_M + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(do_not_specialize=["num_experts"])
def _grouped_kernel(
    x, weight, order, starts, shares, out, num_experts, num_out, width,
    TOP_K: tl.constexpr, IS_GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """IS_GATED: x by token → silu(gate) · up, sorted; else x sorted → share · product, by pair.

    order: the pair (token · TOP_K + place) of each sorted row. weight: [num_experts, (2 ·) num_out, width].
    """
    wait_for_inputs()
    tile, columns = tl.program_id(1), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = _find_expert(starts, tile, num_experts, BLOCK_M)
    begin, end = tl.load(starts + expert), tl.load(starts + expert + 1)
    first = begin + (tile - (begin // BLOCK_M + expert)) * BLOCK_M
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    pairs = tl.load(order + rows, mask=rows < end, other=0)
    sources = pairs // TOP_K if IS_GATED else rows
    targets = rows if IS_GATED else pairs
    present, kept = (rows < end)[:, None], columns[None, :] < num_out
    matrix = weight + expert.to(tl.int64) * (2 if IS_GATED else 1) * num_out * width
    depth = tl.arange(0, BLOCK_K)
    lines = x + sources.to(tl.int64)[:, None] * width + depth[None, :]
    places = matrix + columns.to(tl.int64)[None, :] * width + depth[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, width, BLOCK_K):
        inside = depth < width - k
        values = tl.load(lines + k, mask=present & inside[None, :], other=0.0)
        mask = inside[:, None] & kept
        acc = tl.dot(values, tl.load(places + k, mask=mask, other=0.0), acc, input_precision="ieee")
        if IS_GATED:
            up = tl.load(places + num_out * width + k, mask=mask, other=0.0)
            acc_up = tl.dot(values, up, acc_up, input_precision="ieee")
    if IS_GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    else:
        acc = acc * tl.load(shares + pairs, mask=rows < end, other=0.0)[:, None]
    place = targets.to(tl.int64)[:, None] * num_out + columns[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=present & kept)


def expert_mlp(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shares: torch.Tensor,
    experts: torch.Tensor,
) -> torch.Tensor:
    num_tokens, width = x.shape
    num_experts, inner = len(gate_up), down.shape[2]
    top_k = experts.shape[1]
    by_expert, order = experts.flatten().sort(stable=True)
    borders = torch.arange(num_experts + 1, device=x.device)
    starts = torch.searchsorted(by_expert, borders)
    tiling = _tiling(num_tokens * top_k, num_experts)
    hidden = x.new_empty(num_tokens * top_k, inner)
    _grouped(x, gate_up, order, starts, shares, hidden, top_k, True, tiling)
    parts = torch.empty(num_tokens, top_k, width, dtype=torch.float32, device=x.device)
    _grouped(hidden, down, order, starts, shares, parts, top_k, False, tiling)
    return parts.sum(1).to(x.dtype)


def _grouped(
    x: torch.Tensor,
    weight: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    shares: torch.Tensor,
    out: torch.Tensor,
    top_k: int,
    is_gated: bool,
    tiling: Tiling,
) -> None:
    num_out, num_experts = out.shape[-1], len(weight)
    tiles = len(order) // tiling.rows + num_experts
    _grouped_kernel[(triton.cdiv(num_out, tiling.columns), tiles)](
        x, weight, order, starts, shares, out, num_experts, num_out, x.shape[1], top_k, is_gated,
        tiling.rows, tiling.columns, tiling.depth,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, **OVERLAP,
    )  # fmt: skip


def _tiling(num_pairs: int, num_experts: int) -> Tiling:
    return FEW if num_pairs <= FEW.rows * num_experts else MANY
