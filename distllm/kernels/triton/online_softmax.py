"""The inner loop of attention: positions of the paged cache folded into a running softmax, tile by tile.

The query heads of one KV head are rows of one tile, so that the tensor cores work even on one token. The
softmax is the online one (Milakov and Gimelshein 2018; Dao et al. 2022), in powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _shape_scores(scores, distance, scale, slope, SOFTCAP: tl.constexpr):
    """q kᵀ, scaled, capped and biased; as powers of two."""
    if SOFTCAP > 0:  # tanh(x) = 1 − 2 / (exp(2x) + 1)
        exp_2x = tl.exp2(scores * (scale * (2.0 * LOG2E / SOFTCAP)))
        scores = (SOFTCAP * LOG2E) * (1.0 - 2.0 / (exp_2x + 1.0))
    else:
        scores = scores * (scale * LOG2E)
    if slope is not None:
        scores -= distance.to(tl.float32) * (slope * LOG2E)[:, None]
    return scores


@triton.jit
def fold_positions(
    q, keys, values, column, table, first, stop, at, m, total, acc, scale, slope,
    BY_PAGE: tl.constexpr, KV_STRIDE: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fold positions [first, stop) of one row and KV head into (m, total, acc): maximum, sum, values.

    q: [M, BLOCK_D]; at: [M], the position of each query, which sees those up to its own and, with WINDOW, the
    last WINDOW of them alone: without, every query must see one of the first TILE positions. Without MASKED,
    every query sees all of them, and they are a multiple of TILE. slope: [M], the queries' alibi slopes, or
    None. column: where the KV head begins in a line of the cache. BY_PAGE: keys and values are descriptors
    of [TILE, BLOCK_D] boxes of its lines, each within one block, as first and the block size are multiples of
    TILE; elsewhere they are pointers.
    """
    SHAPED: tl.constexpr = SOFTCAP > 0 or slope is not None
    columns = tl.arange(0, BLOCK_D)
    for start in range(first, stop, TILE):
        positions = start + tl.arange(0, TILE)
        present = positions < stop
        mask = present[:, None] & (columns[None, :] < HEAD_DIM)
        if BY_PAGE:
            line = tl.load(table + start // BLOCK_SIZE) * BLOCK_SIZE + start % BLOCK_SIZE
            k = keys.load([line, column])
        else:
            if MASKED:
                blocks = tl.load(table + positions // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
            else:
                blocks = tl.load(table + positions // BLOCK_SIZE).to(tl.int64)
            lines = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
            places = lines[:, None] * KV_STRIDE + (column + columns)[None, :]
            if MASKED or HEAD_DIM != BLOCK_D:
                k = tl.load(keys + places, mask=mask, other=0.0)
            else:
                k = tl.load(keys + places)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        factor = scale * LOG2E
        if SHAPED:
            scores = _shape_scores(scores, at[:, None] - positions[None, :], scale, slope, SOFTCAP)
            factor = 1.0
        if MASKED:
            seen = present[None, :] & (positions[None, :] <= at[:, None])
            if WINDOW:
                seen &= positions[None, :] > at[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1) * factor)
        base = m_new
        if MASKED and WINDOW:  # −∞ as long as a query has seen nothing, and −∞ − −∞ would be NaN
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(scores * factor - base[:, None])
        decay = tl.exp2(m - base)
        total = total * decay + tl.sum(p, 1)
        if BY_PAGE:
            v = values.load([line, column])
        elif MASKED or HEAD_DIM != BLOCK_D:
            v = tl.load(values + places, mask=mask, other=0.0)
        else:
            v = tl.load(values + places)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        m = m_new
    return m, total, acc
