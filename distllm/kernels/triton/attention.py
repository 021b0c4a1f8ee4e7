"""Causal attention over the paged KV cache. The query heads of one KV head share a tile, so that the tensor cores
work even on one token.

Decode splits the context over programs, since batch × KV heads alone would not fill the device; how many tokens a
split takes is read from seq_lens on the device, so a captured graph serves any length. Prefill walks tiles of
queries; which row a tile belongs to is found by bisecting cu_seqlens_q, so ragged batches need no host work.
The softmax is the online one (Milakov and Gimelshein 2018; Dao et al. 2022), split as in Flash-Decoding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distllm.kernels.batch import TokenBatch

LOG2E = tl.constexpr(1.4426950408889634)
MAX_SPLITS = 64
PROGRAMS_WANTED = 2 * 132  # twice the multiprocessors of the devices that this is tuned for


@triton.jit
def _attend(
    q,
    keys,
    values,
    table,
    first,
    stop,
    last_seen,
    m,
    l,
    acc,
    scale,
    kv_stride,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fold positions [first, stop) of one row and KV head into the running softmax of a query tile.

    q: [M, BLOCK_D]; last_seen: [M], the last position that each query sees.
    """
    columns = tl.arange(0, BLOCK_D)
    inside = columns[None, :] < HEAD_DIM
    for start in range(first, stop, TILE):
        positions = start + tl.arange(0, TILE)
        present = positions < stop
        blocks = tl.load(table + positions // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
        rows = (blocks * BLOCK_SIZE + positions % BLOCK_SIZE)[:, None] * kv_stride + columns[None, :]
        k = tl.load(keys + rows, mask=present[:, None] & inside, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * (scale * LOG2E)
        scores = tl.where(
            present[None, :] & (positions[None, :] <= last_seen[:, None]), scores, float("-inf")
        )
        m_new = tl.maximum(m, tl.max(scores, 1))
        # A query that has seen nothing yet keeps −inf: subtract 0 instead, so that no NaN arises.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(m - shift)
        l = l * decay + tl.sum(p, 1)
        v = tl.load(values + rows, mask=present[:, None] & inside, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None])
        m = m_new
    return m, l, acc


@triton.jit
def _decode_kernel(
    q,
    keys,
    values,
    block_table,
    seq_lens,
    out,
    partial,
    lse,
    scale,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_lens + row)
    per_split = tl.cdiv(tl.cdiv(seq_len, TILE), NUM_SPLITS) * TILE
    first = split * per_split
    stop = tl.minimum(first + per_split, seq_len)
    members, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = (members[:, None] < GROUP) & (columns[None, :] < HEAD_DIM)
    heads = row * NUM_KV_HEADS * GROUP + kv_head * GROUP + members
    query = tl.load(q + heads[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last_seen = tl.full([BLOCK_M], 0, tl.int32) + seq_len
    m, l, acc = _attend(
        query,
        keys + kv_head * HEAD_DIM,
        values + kv_head * HEAD_DIM,
        block_table + row.to(tl.int64) * table_stride,
        first,
        stop,
        last_seen,
        m,
        l,
        acc,
        scale,
        NUM_KV_HEADS * HEAD_DIM,
        BLOCK_SIZE,
        TILE,
        HEAD_DIM,
        BLOCK_D,
    )
    result = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    if NUM_SPLITS == 1:
        tl.store(
            out + heads[:, None] * HEAD_DIM + columns[None, :], result.to(out.dtype.element_ty), mask=inside
        )
    else:
        place = heads * NUM_SPLITS + split
        tl.store(partial + place[:, None] * HEAD_DIM + columns[None, :], result, mask=inside)
        tl.store(lse + place, tl.where(l == 0.0, float("-inf"), m + tl.log2(l)), mask=members < GROUP)


@triton.jit
def _combine_kernel(
    partial, lse, out, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, NUM_SPLITS: tl.constexpr
):
    """One program a row and head: weigh the splits by their sums of exponentials. NUM_SPLITS is a power of two."""
    head = tl.program_id(0).to(tl.int64)
    splits, columns = tl.arange(0, NUM_SPLITS), tl.arange(0, BLOCK_D)
    weight = tl.load(lse + head * NUM_SPLITS + splits)
    weight = tl.exp2(weight - tl.max(weight))
    place = (head * NUM_SPLITS + splits)[:, None] * HEAD_DIM + columns[None, :]
    inside = columns < HEAD_DIM
    values = tl.load(partial + place, mask=(weight[:, None] > 0) & inside[None, :], other=0.0)
    result = tl.sum(values * weight[:, None], 0) / tl.sum(weight)
    tl.store(out + head * HEAD_DIM + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _find_row(cu_seqlens, tile, num_rows, BLOCK_Q: tl.constexpr):
    """The row of a query tile. Row i's tiles begin at cu_seqlens[i] // BLOCK_Q + i: an over-estimate that is
    monotonic, and leaves at most one idle tile a row."""
    low, high = 0, num_rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // BLOCK_Q + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _prefill_kernel(
    q,
    keys,
    values,
    block_table,
    cu_seqlens,
    seq_lens,
    out,
    scale,
    table_stride,
    num_rows,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P2: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile is BLOCK_Q tokens × the GROUP query heads of one KV head."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    row = _find_row(cu_seqlens, tile, num_rows, BLOCK_Q)
    begin, end = tl.load(cu_seqlens + row), tl.load(cu_seqlens + row + 1)
    offset = (tile - (begin // BLOCK_Q + row)) * BLOCK_Q
    if offset >= end - begin:
        return
    seq_len = tl.load(seq_lens + row)
    members = tl.arange(0, BLOCK_Q * GROUP_P2)
    token, head = offset + members // GROUP_P2, members % GROUP_P2
    columns = tl.arange(0, BLOCK_D)
    inside = ((token < end - begin) & (head < GROUP))[:, None] & (columns[None, :] < HEAD_DIM)
    heads = (begin + token).to(tl.int64) * NUM_KV_HEADS * GROUP + kv_head * GROUP + head
    query = tl.load(q + heads[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
    last_seen = seq_len - (end - begin) + token
    stop = tl.minimum(seq_len, seq_len - (end - begin) + offset + BLOCK_Q)
    m = tl.full([BLOCK_Q * GROUP_P2], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_Q * GROUP_P2], tl.float32)
    acc = tl.zeros([BLOCK_Q * GROUP_P2, BLOCK_D], tl.float32)
    m, l, acc = _attend(
        query,
        keys + kv_head * HEAD_DIM,
        values + kv_head * HEAD_DIM,
        block_table + row.to(tl.int64) * table_stride,
        0,
        stop,
        last_seen,
        m,
        l,
        acc,
        scale,
        NUM_KV_HEADS * HEAD_DIM,
        BLOCK_SIZE,
        TILE,
        HEAD_DIM,
        BLOCK_D,
    )
    result = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    tl.store(out + heads[:, None] * HEAD_DIM + columns[None, :], result.to(out.dtype.element_ty), mask=inside)


def paged_attention(
    q: torch.Tensor, kv_cache_layer: torch.Tensor, batch: TokenBatch, scale: float
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = q.shape
    out = q.new_empty(num_tokens, num_heads * head_dim)
    if num_tokens == len(batch.seq_lens):
        _decode(q, kv_cache_layer, batch, scale, out)
    else:
        _prefill(q, kv_cache_layer, batch, scale, out)
    return out


def num_splits(num_rows: int, num_kv_heads: int) -> int:
    """A power of two that fills the device; a function of shapes alone, so that it can be captured."""
    wanted = triton.cdiv(PROGRAMS_WANTED, num_rows * num_kv_heads)
    return min(MAX_SPLITS, triton.next_power_of_2(wanted))


def _decode(
    q: torch.Tensor, kv_cache_layer: torch.Tensor, batch: TokenBatch, scale: float, out: torch.Tensor
) -> None:
    num_rows, num_heads, head_dim = q.shape
    block_size, num_kv_heads = kv_cache_layer.shape[2:4]
    group, splits = num_heads // num_kv_heads, num_splits(num_rows, num_kv_heads)
    block_d = max(16, triton.next_power_of_2(head_dim))
    partial = lse = out
    if splits > 1:
        partial = torch.empty(num_rows, num_heads, splits, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(num_rows, num_heads, splits, dtype=torch.float32, device=q.device)
    _decode_kernel[(num_rows, num_kv_heads, splits)](
        q, kv_cache_layer[0], kv_cache_layer[1], batch.block_table, batch.seq_lens, out, partial, lse, scale,
        batch.block_table.stride(0), num_kv_heads, group, max(16, triton.next_power_of_2(group)), head_dim,
        block_d, block_size, 64 if block_d <= 128 else 32, splits, num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(num_rows * num_heads,)](partial, lse, out, head_dim, block_d, splits, num_warps=4)


def _prefill(
    q: torch.Tensor, kv_cache_layer: torch.Tensor, batch: TokenBatch, scale: float, out: torch.Tensor
) -> None:
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = kv_cache_layer.shape[2:4]
    group = num_heads // num_kv_heads
    group_p2 = triton.next_power_of_2(group)
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_q = max(1, (128 if block_d <= 128 else 64) // group_p2)
    num_rows = len(batch.seq_lens)
    _prefill_kernel[(num_tokens // block_q + num_rows, num_kv_heads)](
        q, kv_cache_layer[0], kv_cache_layer[1], batch.block_table, batch.cu_seqlens_q, batch.seq_lens, out, scale,
        batch.block_table.stride(0), num_rows, num_kv_heads, group, group_p2, block_q, head_dim, block_d,
        block_size, 64 if block_d <= 128 else 32, num_warps=8, num_stages=3,
    )  # fmt: skip
