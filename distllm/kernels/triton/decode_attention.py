"""Attention of rows of one token each: memory-bound, one pass over the KV.

Where batch × KV heads alone would not fill the device, the context is split over programs and combined by a
second kernel, as in Flash-Decoding. How many tokens a split takes is read from seq_lens on the device, so a
captured graph serves any length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distllm.kernels.batch import TokenBatch
from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs
from distllm.kernels.triton.online_softmax import fold_positions

PROGRAMS_WANTED = 2 * 132  # twice the multiprocessors of the devices that this is tuned for
MAX_SPLITS = 64
GRAIN = tl.constexpr(64)  # tokens: a split takes a multiple


@triton.jit
def _num_seen(seq_len, WINDOW: tl.constexpr):
    return tl.minimum(seq_len, WINDOW) if WINDOW else seq_len


@triton.jit
def _tokens_per_split(num_seen, num_splits):
    return tl.cdiv(tl.cdiv(num_seen, num_splits), GRAIN) * GRAIN


@triton.jit(do_not_specialize=["num_splits", "table_stride"])
def _decode_kernel(
    q, keys, values, block_table, seq_lens, slopes, out, partial, lse, scale, table_stride, num_splits,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The splits share the positions inside of the window, which all are seen: no tile is masked for it."""
    # KV heads of a token lie side by side: programs that run together read whole lines of the cache.
    kv_head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Written before the kernel that stored this step's KV, which has waited for it.
    seq_len = tl.load(seq_lens + row)
    wait_for_inputs()
    num_seen = _num_seen(seq_len, WINDOW)
    per_split = _tokens_per_split(num_seen, num_splits)
    first = seq_len - num_seen + split * per_split
    if first >= seq_len:
        return
    members, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = (members[:, None] < GROUP) & (columns[None, :] < HEAD_DIM)
    places = members[:, None] * HEAD_DIM + columns[None, :]
    group = row.to(tl.int64) * NUM_KV_HEADS + kv_head
    q += group * GROUP * HEAD_DIM
    out += group * GROUP * HEAD_DIM
    query = tl.load(q + places, mask=inside, other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    at = tl.full([BLOCK_M], -1, tl.int32) + seq_len
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + kv_head * GROUP + members, mask=members < GROUP, other=0.0)
    m, total, acc = fold_positions(
        query, keys, values, kv_head * HEAD_DIM, block_table + row.to(tl.int64) * table_stride, first,
        tl.minimum(first + per_split, seq_len), at, m, total, acc, scale, slope, False,
        NUM_KV_HEADS * HEAD_DIM, True, 0, SOFTCAP, BLOCK_SIZE, TILE, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    result = acc / total[:, None]
    if per_split >= num_seen:
        tl.store(out + places, result.to(out.dtype.element_ty), mask=inside)
    else:
        partial += group * num_splits * GROUP * HEAD_DIM
        lse += group * num_splits * GROUP
        tl.store(partial + split * GROUP * HEAD_DIM + places, result, mask=inside)
        tl.store(lse + split * GROUP + members, m + tl.log2(total), mask=members < GROUP)


@triton.jit(do_not_specialize=["num_splits"])
def _combine_kernel(
    partial, lse, seq_lens, out, num_splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Weigh the splits of one row and head by their sums of exponentials.

    partial: [rows, KV heads, splits, GROUP, HEAD_DIM]. A row that was not split is in out already.
    """
    kv_head, member, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_seen = _num_seen(tl.load(seq_lens + row), WINDOW)
    wait_for_inputs()
    per_split = _tokens_per_split(num_seen, num_splits)
    if per_split >= num_seen:
        return
    used = tl.cdiv(num_seen, per_split)
    group = row.to(tl.int64) * tl.num_programs(0) + kv_head
    columns = tl.arange(0, BLOCK_D)
    m, total = float("-inf"), 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, used, CHUNK):
        splits = start + tl.arange(0, CHUNK)
        places = (group * num_splits + splits) * GROUP + member
        inside = (splits < used)[:, None] & (columns < HEAD_DIM)[None, :]
        tile = tl.load(partial + places[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
        each = tl.load(lse + places, mask=splits < used, other=float("-inf"))
        m_new = tl.maximum(m, tl.max(each))
        weight, decay = tl.exp2(each - m_new), tl.exp2(m - m_new)
        acc = acc * decay + tl.sum(tile * weight[:, None], 0)
        total = total * decay + tl.sum(weight)
        m = m_new
    place = (group * GROUP + member) * HEAD_DIM + columns
    tl.store(out + place, (acc / total).to(out.dtype.element_ty), mask=columns < HEAD_DIM)


def num_splits(num_rows: int, num_kv_heads: int) -> int:
    """Enough to fill the device; a function of shapes alone, so that it can be captured."""
    return max(1, min(MAX_SPLITS, PROGRAMS_WANTED // (num_rows * num_kv_heads)))


def decode_attention(
    q: torch.Tensor,
    kv_cache_layer: torch.Tensor,
    batch: TokenBatch,
    scale: float,
    window: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """The batch's decodes. out: [num_tokens, num_heads · head_dim]; the first num_decodes are written."""
    num_rows, (num_heads, head_dim) = batch.num_decodes, q.shape[1:]
    block_size, num_kv_heads = kv_cache_layer.shape[2:4]
    group, splits = num_heads // num_kv_heads, num_splits(num_rows, num_kv_heads)
    group_p2, block_d = triton.next_power_of_2(group), max(16, triton.next_power_of_2(head_dim))
    # Without splits nothing is written here: any fp32 pointers will do.
    shape = (num_rows, num_heads, splits) if splits > 1 else (1, 1, 1)
    partial = torch.empty(*shape, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    _decode_kernel[(num_kv_heads, num_rows, splits)](
        q, kv_cache_layer[0], kv_cache_layer[1], batch.block_table, batch.seq_lens, alibi_slopes, out,
        partial, lse, scale, batch.block_table.stride(0), splits, num_kv_heads, group, max(16, group_p2),
        head_dim, block_d, block_size, _tile(num_rows * num_kv_heads, block_d), window, softcap,
        num_warps=4, num_stages=3, **OVERLAP,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(num_kv_heads, group, num_rows)](
            partial, lse, batch.seq_lens, out, splits, group, head_dim, block_d, 32, window,
            num_warps=4, **OVERLAP,
        )  # fmt: skip


def _tile(num_programs: int, block_d: int) -> int:
    """Positions at a time: many programs hide each other's latency with small tiles, few need larger ones."""
    return 32 if block_d > 128 or num_programs >= 2 * PROGRAMS_WANTED else 64
