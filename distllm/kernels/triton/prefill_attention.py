"""Attention of ragged rows of any number of tokens, over what the cache holds of them: compute-bound.

A program takes a tile of queries × the heads of one KV head. Which row a tile belongs to is found by
bisecting cu_seqlens_q, so ragged batches need no host work. The batch's decodes are left out. Where KV
blocks hold whole tiles, the tensor memory accelerator fetches them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from distllm.kernels.batch import TokenBatch
from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs
from distllm.kernels.triton.online_softmax import fold_positions

TILE = 64  # positions at a time, of keys up to 256 bytes wide; fewer beyond, as are the queries
LONG_ROW = 2048  # tokens


@triton.jit
def _find_row(cu_seqlens, tile, base, num_rows, BLOCK_Q: tl.constexpr):
    """The row of a query tile. Row i's tiles begin at (cu_seqlens[i] − base) // BLOCK_Q + i, where base is
    cu_seqlens[0]: an over-estimate that is monotonic, and leaves at most one idle tile a row."""
    low, high = 0, num_rows
    while low < high:
        middle = (low + high) // 2
        if (tl.load(cu_seqlens + middle) - base) // BLOCK_Q + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(do_not_specialize=["num_decodes", "num_rows", "table_stride"])
def _prefill_kernel(
    q, keys, values, block_table, cu_seqlens, seq_lens, slopes, out, scale, table_stride,
    num_decodes, num_rows,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P2: tl.constexpr, BLOCK_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BY_PAGE: tl.constexpr,
):  # fmt: skip
    """A tile is BLOCK_Q tokens × the GROUP query heads of one KV head. num_rows: after the decodes."""
    wait_for_inputs()
    # The last tiles see the most positions: they start first, so that the short ones fill the end.
    kv_head, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    cu_seqlens += num_decodes  # of one token each, so that the other rows' tokens begin there too
    row = _find_row(cu_seqlens, tile, num_decodes, num_rows, BLOCK_Q)
    begin, end = tl.load(cu_seqlens + row), tl.load(cu_seqlens + row + 1)
    offset = (tile - ((begin - num_decodes) // BLOCK_Q + row)) * BLOCK_Q
    if offset >= end - begin:
        return
    row += num_decodes
    cached = tl.load(seq_lens + row) - (end - begin)
    members, columns = tl.arange(0, BLOCK_Q * GROUP_P2), tl.arange(0, BLOCK_D)
    token, head = offset + members // GROUP_P2, members % GROUP_P2
    inside = ((token < end - begin) & (head < GROUP))[:, None] & (columns[None, :] < HEAD_DIM)
    heads = ((begin + token).to(tl.int64) * NUM_KV_HEADS + kv_head) * GROUP + head
    places = heads[:, None] * HEAD_DIM + columns[None, :]
    query = tl.load(q + places, mask=inside, other=0.0)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + kv_head * GROUP + head, mask=head < GROUP, other=0.0)
    column = kv_head * HEAD_DIM
    block_table += row.to(tl.int64) * table_stride
    stop = cached + tl.minimum(offset + BLOCK_Q, end - begin)
    seen_by_all = (cached + offset + 1) // TILE * TILE
    at = cached + token
    m = tl.full([BLOCK_Q * GROUP_P2], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q * GROUP_P2], tl.float32)
    acc = tl.zeros([BLOCK_Q * GROUP_P2, BLOCK_D], tl.float32)
    start = 0
    if WINDOW:
        at = tl.minimum(at, stop - 1)  # what fills the tile up sees something, too
        # From the tile where the first query's window begins to the one from where on the last's is full.
        edge = tl.maximum(cached + offset + 1 - WINDOW, 0) // TILE * TILE
        start = tl.minimum(tl.cdiv(tl.maximum(stop - WINDOW, 0), TILE) * TILE, seen_by_all)
        m, total, acc = fold_positions(
            query, keys, values, column, block_table, edge, start, at, m, total, acc, scale, slope,
            BY_PAGE, NUM_KV_HEADS * HEAD_DIM, True, WINDOW, SOFTCAP, BLOCK_SIZE, TILE, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    m, total, acc = fold_positions(
        query, keys, values, column, block_table, start, seen_by_all, at, m, total, acc, scale, slope,
        BY_PAGE, NUM_KV_HEADS * HEAD_DIM, False, WINDOW, SOFTCAP, BLOCK_SIZE, TILE, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    m, total, acc = fold_positions(
        query, keys, values, column, block_table, seen_by_all, stop, at, m, total, acc, scale, slope,
        BY_PAGE, NUM_KV_HEADS * HEAD_DIM, True, WINDOW, SOFTCAP, BLOCK_SIZE, TILE, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    tl.store(out + places, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


def prefill_attention(
    q: torch.Tensor,
    kv_cache_layer: torch.Tensor,
    batch: TokenBatch,
    scale: float,
    window: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """The rows after the decodes. out: [num_tokens, num_heads · head_dim]; all after those are written."""
    num_heads, head_dim = q.shape[1:]
    num_tokens, num_rows = len(q) - batch.num_decodes, len(batch.seq_lens) - batch.num_decodes
    block_size, num_kv_heads = kv_cache_layer.shape[2:4]
    group = num_heads // num_kv_heads
    group_p2, block_d = triton.next_power_of_2(group), max(16, triton.next_power_of_2(head_dim))
    shrink = max(1, block_d * q.element_size() // 256)
    tile = TILE // shrink
    by_page = block_size % tile == 0 and num_kv_heads * head_dim * q.element_size() % 16 == 0
    block_m, num_warps, num_stages = _queries(num_tokens, num_rows, by_page)
    block_q = max(1, block_m // shrink // group_p2)
    keys, values = _boxes(kv_cache_layer, tile, block_d) if by_page else kv_cache_layer
    _prefill_kernel[(num_kv_heads, num_tokens // block_q + num_rows)](
        q, keys, values, batch.block_table, batch.cu_seqlens_q, batch.seq_lens, alibi_slopes, out, scale,
        batch.block_table.stride(0), batch.num_decodes, num_rows, num_kv_heads, group, group_p2, block_q,
        head_dim, block_d, block_size, tile, window, softcap, by_page,
        num_warps=num_warps, num_stages=num_stages, **OVERLAP,
    )  # fmt: skip


def _boxes(kv_cache_layer: torch.Tensor, tile: int, block_d: int) -> list[TensorDescriptor]:
    """Keys and values for the tensor memory accelerator. A box may reach into the next head's columns or past
    the end: those meet zeros of q, and are not stored.
    """
    lines = kv_cache_layer.flatten(1, 2).flatten(2)  # [2, positions, KV heads · head_dim]
    return [TensorDescriptor.from_tensor(part, [tile, block_d]) for part in lines]


def _queries(num_tokens: int, num_rows: int, by_page: bool) -> tuple[int, int, int]:
    """(queries × heads of a program, warps, stages): large tiles read KV less often, but need many tokens, or
    long rows where every position has to be looked up.
    """
    if by_page:
        return (128, 4, 3) if num_tokens >= LONG_ROW else (64, 4, 3)
    return (256, 16, 5) if num_tokens >= LONG_ROW * num_rows else (64, 4, 3)
