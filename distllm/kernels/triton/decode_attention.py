"""Attention of rows of one token each, or of a few: memory-bound, one pass over the KV.

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
LONGER_THAN_ANY = 2**30  # tokens: a window that hides nothing
GRAIN = tl.constexpr(64)  # tokens: a split takes a multiple


@triton.jit
def _num_seen(seq_len, WINDOW: tl.constexpr, MAX_Q: tl.constexpr):
    """Positions that any of the row's tokens sees."""
    return tl.minimum(seq_len, WINDOW + MAX_Q - 1) if WINDOW else seq_len


@triton.jit
def _tokens_per_split(num_seen, num_splits):
    return tl.cdiv(tl.cdiv(num_seen, num_splits), GRAIN) * GRAIN


@triton.jit(do_not_specialize=["num_splits", "table_stride"])
def _decode_kernel(
    q, keys, values, block_table, cu_seqlens, seq_lens, slopes, out, partial, lse, scale, table_stride,
    num_splits,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P2: tl.constexpr, BLOCK_M: tl.constexpr,
    MAX_Q: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, SEEN: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A tile is the row's tokens × the GROUP query heads of one KV head. The splits share the positions that
    any token sees. A single one sees all of these: no tile is masked for the window, and SEEN is 0. Of
    several each sees its own last SEEN positions, which may be none of a split's.
    """
    # KV heads of a token lie side by side: programs that run together read whole lines of the cache.
    kv_head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Written before the kernel that stored this step's KV, which has waited for it.
    seq_len = tl.load(seq_lens + row)
    wait_for_inputs()
    num_seen = _num_seen(seq_len, WINDOW, MAX_Q)
    per_split = _tokens_per_split(num_seen, num_splits)
    first = seq_len - num_seen + split * per_split
    if first >= seq_len:
        return
    begin, num_tokens = row, 1
    if MAX_Q > 1:
        begin = tl.load(cu_seqlens + row)
        num_tokens = tl.minimum(tl.load(cu_seqlens + row + 1) - begin, MAX_Q)
    members, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    token, head = members // GROUP_P2, members % GROUP_P2
    present = (token < num_tokens) & (head < GROUP)
    inside = present[:, None] & (columns[None, :] < HEAD_DIM)
    heads = ((begin + token).to(tl.int64) * NUM_KV_HEADS + kv_head) * GROUP + head
    places = heads[:, None] * HEAD_DIM + columns[None, :]
    query = tl.load(q + places, mask=inside, other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    at = tl.minimum(seq_len - num_tokens + token, seq_len - 1)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + kv_head * GROUP + head, mask=head < GROUP, other=0.0)
    m, total, acc = fold_positions(
        query, keys, values, kv_head * HEAD_DIM, block_table + row.to(tl.int64) * table_stride, first,
        tl.minimum(first + per_split, seq_len), at, m, total, acc, scale, slope, False,
        NUM_KV_HEADS * HEAD_DIM, True, SEEN, SOFTCAP, BLOCK_SIZE, TILE, HEAD_DIM,
        BLOCK_D,
    )  # fmt: skip
    if MAX_Q > 1:  # an early token may see nothing of the last split
        total = tl.where(total > 0, total, 1.0)
    result = acc / total[:, None]
    if per_split >= num_seen:
        tl.store(out + places, result.to(out.dtype.element_ty), mask=inside)
    else:
        group = row.to(tl.int64) * NUM_KV_HEADS + kv_head
        member = (group * num_splits + split) * MAX_Q * GROUP + token * GROUP + head
        tl.store(partial + member[:, None] * HEAD_DIM + columns[None, :], result, mask=inside)
        tl.store(lse + member, m + tl.log2(total), mask=present)


@triton.jit(do_not_specialize=["num_splits"])
def _combine_kernel(
    partial, lse, cu_seqlens, seq_lens, out, num_splits,
    GROUP: tl.constexpr, MAX_Q: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Weigh the splits of one token and head by their sums of exponentials.

    partial: [rows, KV heads, splits, MAX_Q, GROUP, HEAD_DIM]. A row that was not split is in out already.
    """
    kv_head, member, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_seen = _num_seen(tl.load(seq_lens + row), WINDOW, MAX_Q)
    begin, token = row, 0
    if MAX_Q > 1:
        begin, token = tl.load(cu_seqlens + row), member // GROUP
        if begin + token >= tl.load(cu_seqlens + row + 1):
            return
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
        places = (group * num_splits + splits) * MAX_Q * GROUP + member
        inside = (splits < used)[:, None] & (columns < HEAD_DIM)[None, :]
        tile = tl.load(partial + places[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
        each = tl.load(lse + places, mask=splits < used, other=float("-inf"))
        m_new = tl.maximum(m, tl.max(each))
        weight, decay = tl.exp2(each - m_new), tl.exp2(m - m_new)
        acc = acc * decay + tl.sum(tile * weight[:, None], 0)
        total = total * decay + tl.sum(weight)
        m = m_new
    head = ((begin + token).to(tl.int64) * tl.num_programs(0) + kv_head) * GROUP + member % GROUP
    tl.store(out + head * HEAD_DIM + columns, (acc / total).to(out.dtype.element_ty), mask=columns < HEAD_DIM)


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
    """The batch's decodes. out: [num_tokens, num_heads · head_dim]; their tokens are written."""
    num_rows, max_q, (num_heads, head_dim) = batch.num_decodes, batch.decode_len, q.shape[1:]
    block_size, num_kv_heads = kv_cache_layer.shape[2:4]
    group, splits = num_heads // num_kv_heads, num_splits(num_rows, num_kv_heads)
    group_p2, block_d = triton.next_power_of_2(group), max(16, triton.next_power_of_2(head_dim))
    block_m = max(16, triton.next_power_of_2(max_q) * group_p2)
    seen = (window or LONGER_THAN_ANY) if max_q > 1 else 0
    # Without splits nothing is written here: any fp32 pointers will do.
    shape = (num_rows, max_q * num_heads, splits) if splits > 1 else (1, 1, 1)
    partial = torch.empty(*shape, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    _decode_kernel[(num_kv_heads, num_rows, splits)](
        q, kv_cache_layer[0], kv_cache_layer[1], batch.block_table, batch.cu_seqlens_q, batch.seq_lens,
        alibi_slopes, out, partial, lse, scale, batch.block_table.stride(0), splits, num_kv_heads, group,
        group_p2 if max_q > 1 else block_m, block_m, max_q, head_dim, block_d, block_size,
        _tile(num_rows * num_kv_heads, block_d), window, seen, softcap,
        num_warps=4, num_stages=3, **OVERLAP,
    )  # fmt: skip
    if splits > 1:
        _combine_kernel[(num_kv_heads, max_q * group, num_rows)](
            partial, lse, batch.cu_seqlens_q, batch.seq_lens, out, splits, group, max_q, head_dim, block_d,
            32, window,
            num_warps=4, **OVERLAP,
        )  # fmt: skip


def _tile(num_programs: int, block_d: int) -> int:
    """Positions at a time: many programs hide each other's latency with small tiles, few need larger ones."""
    return 32 if block_d > 128 or num_programs >= 2 * PROGRAMS_WANTED else 64
