"""Argmax and Gumbel-max over the vocabulary in one pass: no softmax, no noise tensor, no sort.

The noise is the hash of `kernels.reference.sampling`, in 32-bit arithmetic. A row's programs each take a
piece of the vocabulary; a second, tiny kernel takes the best of the pieces, as it does of the shards of
several ranks: the lowest id where scores tie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs

BLOCK, NUM_WARPS = 1024, 8
MAX_PIECES = 64
PROGRAMS_WANTED = 8 * 132  # eight on each multiprocessor of the devices that this is tuned for
LN2 = tl.constexpr(0.6931471805599453)
ON_GPU = tl.constexpr(torch.cuda.is_available())  # elsewhere Triton's interpreter, which has no libdevice


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _noise_key(seed, position):
    """The 64 bits that a row's noise is made of."""
    mixed = _mix64(seed.to(tl.uint64, bitcast=True))
    return _mix64(mixed + (position.to(tl.uint64, bitcast=True) + 1) * 0x9E3779B97F4A7C15)


@triton.jit
def _log(x):
    """Of a normal number, within 2e-7 around 1 and by 2⁻²² elsewhere: one instruction and a product.

    Two of them an entry bound the sampling of large batches; tl.log and tl.log2 take two dozen instructions.
    """
    if ON_GPU:
        return libdevice.fast_log2f(x) * LN2
    else:
        return tl.log(x)


@triton.jit
def _gumbel(entries, key):
    bits = _mix32(entries.to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32))
    bits = _mix32(bits ^ (key >> 32).to(tl.uint32))
    # −log(u) from 1 − u: entries that win have u next to 1, which fp32 would round to 1, and the noise to ∞.
    rest = (
        tl.minimum((0xFFFFFF - (bits >> 8)).to(tl.float32) + 0.5, 16777215.0) * 5.9604644775390625e-08
    )  # 2⁻²⁴
    tail = 0.25 + rest * (0.2 + rest * 0.1666666667)
    series = rest * (1.0 + rest * (0.5 + rest * (0.3333333333 + rest * tail)))
    return -_log(tl.where(rest < 0.0625, series, -_log(1.0 - rest)))


@triton.jit(
    do_not_specialize=["first_entry", "piece_blocks"],
    do_not_specialize_on_alignment=["temperature", "seed", "positions", "lowest"],
)
def _best_of_piece_kernel(
    logits, temperature, seed, positions, lowest, scores, token_ids, first_entry, vocab_size, row_stride,
    piece_blocks, TRUNCATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best score of one piece of a row, and its lowest entry. A piece is piece_blocks · BLOCK entries."""
    wait_for_inputs()
    piece, row = tl.program_id(0), tl.program_id(1)
    first = piece * piece_blocks * BLOCK
    heat = tl.load(temperature + row)
    rate = tl.div_rn(1.0, heat)
    if TRUNCATED:
        border = tl.load(lowest + row)
    key = _noise_key(tl.load(seed + row), tl.load(positions + row))
    logits += row.to(tl.int64) * row_stride
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    # A row of −inf alone still yields an entry of this piece.
    where = tl.minimum(first + tl.arange(0, BLOCK), tl.maximum(vocab_size, 1) - 1)
    for start in range(first, tl.minimum(first + piece_blocks * BLOCK, vocab_size), BLOCK):
        entries = start + tl.arange(0, BLOCK)
        score = tl.load(logits + entries, mask=entries < vocab_size, other=float("-inf")).to(tl.float32)
        draws = heat > 0
        if TRUNCATED:
            score = tl.where(score >= border, score, float("-inf"))
            draws = draws & (tl.max(score) > float("-inf"))  # most blocks keep nothing, and need no noise
        if draws:
            score = score * rate + _gumbel(first_entry + entries, key)
        where = tl.where(score > best, entries, where)  # of equal scores the first stays
        best = tl.maximum(score, best)
    top = tl.max(best)
    entry = tl.min(tl.where(best == top, where, 2147483647))
    out = piece * tl.num_programs(1) + row
    tl.store(scores + out, top)
    tl.store(token_ids + out, first_entry + entry.to(tl.int64))


@triton.jit(do_not_specialize=["num_shards"])
def _choose_best_kernel(scores, token_ids, best_scores, best_ids, num_shards, MAX_SHARDS: tl.constexpr):
    wait_for_inputs()
    row, num_rows = tl.program_id(0), tl.num_programs(0)
    shards = tl.arange(0, MAX_SHARDS)
    places, inside = shards * num_rows + row, shards < num_shards
    score = tl.load(scores + places, mask=inside, other=float("-inf"))
    token_id = tl.load(token_ids + places, mask=inside, other=0x7FFFFFFFFFFFFFFF)
    top = tl.max(score)
    tl.store(best_scores + row, top)
    tl.store(best_ids + row, tl.min(tl.where(score == top, token_id, 0x7FFFFFFFFFFFFFFF)))


def sample_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    positions: torch.Tensor,
    lowest: torch.Tensor | None = None,
) -> torch.Tensor:
    return best_tokens(logits, temperature, seed, positions, lowest)[1]


def best_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    positions: torch.Tensor,
    lowest: torch.Tensor | None = None,
    *,
    first_entry: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, vocab_size = logits.shape
    assert lowest is None or lowest.is_contiguous(), "kernels index columns by row"
    piece_blocks, num_pieces = row_pieces(num_rows, vocab_size)
    scores = torch.empty(num_pieces, num_rows, dtype=torch.float32, device=logits.device)
    token_ids = torch.empty(num_pieces, num_rows, dtype=torch.int64, device=logits.device)
    _best_of_piece_kernel[(num_pieces, num_rows)](
        logits, temperature, seed, positions, lowest, scores, token_ids, first_entry, vocab_size,
        logits.stride(0), piece_blocks, lowest is not None, BLOCK, num_warps=NUM_WARPS, **OVERLAP,
    )  # fmt: skip
    return _best_of_each_row(scores, token_ids)


def choose_best(scores: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return _best_of_each_row(scores, token_ids)[1]


def _best_of_each_row(scores: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_shards, num_rows = scores.shape
    assert scores.is_contiguous() and token_ids.is_contiguous(), "the kernel indexes them by shard and row"
    assert num_shards <= MAX_PIECES, "the kernel sees so many shards at once"
    best_scores, best_ids = torch.empty_like(scores[0]), torch.empty_like(token_ids[0])
    _choose_best_kernel[(num_rows,)](
        scores, token_ids, best_scores, best_ids, num_shards, MAX_PIECES, num_warps=1, **OVERLAP,
    )  # fmt: skip
    return best_scores, best_ids


def row_pieces(num_rows: int, vocab_size: int) -> tuple[int, int]:
    """(blocks of a piece, pieces of a row): enough programs to fill the device, and no more reductions."""
    blocks = max(1, triton.cdiv(vocab_size, BLOCK))
    wanted = max(1, min(blocks, MAX_PIECES, PROGRAMS_WANTED // num_rows))
    piece_blocks = triton.cdiv(blocks, wanted)
    return piece_blocks, triton.cdiv(blocks, piece_blocks)
