"""Argmax and Gumbel-max over the vocabulary in one pass: no softmax, no noise tensor, no sort.

The noise is the hash of `kernels.reference.sampling`, in 32-bit arithmetic. A row's programs each take a
piece of the vocabulary; a second, tiny kernel takes the best of the pieces, the lowest id where values tie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distllm.kernels.reference.sampling import truncate_logits
from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs

BLOCK, NUM_WARPS = 1024, 8
MAX_PIECES = 64
PROGRAMS_WANTED = 8 * 132  # eight on each multiprocessor of the devices that this is tuned for


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
def _gumbel(entries, key):
    bits = _mix32(entries.to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32))
    bits = _mix32(bits ^ (key >> 32).to(tl.uint32))
    # −log(u) from 1 − u: entries that win have u next to 1, which fp32 would round to 1, and the noise to ∞.
    rest = (
        tl.minimum((0xFFFFFF - (bits >> 8)).to(tl.float32) + 0.5, 16777215.0) * 5.9604644775390625e-08
    )  # 2⁻²⁴
    series = rest * (1.0 + rest * (0.5 + rest * (0.3333333333 + rest * 0.25)))
    return -tl.log(tl.where(rest < 0.015625, series, -tl.log(1.0 - rest)))


@triton.jit(do_not_specialize=["piece_blocks", "num_pieces"])
def _best_of_piece_kernel(
    logits, temperature, seed, positions, values, indices, vocab_size, row_stride, piece_blocks, num_pieces,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The best score of one piece of a row, and its lowest entry. A piece is piece_blocks · BLOCK entries."""
    wait_for_inputs()
    piece, row = tl.program_id(0), tl.program_id(1)
    first = piece * piece_blocks * BLOCK
    heat = tl.load(temperature + row)
    key = _noise_key(tl.load(seed + row), tl.load(positions + row))
    logits += row.to(tl.int64) * row_stride
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    # A row of −inf alone still yields an entry of this piece.
    where = tl.minimum(first + tl.arange(0, BLOCK), vocab_size - 1)
    for start in range(first, tl.minimum(first + piece_blocks * BLOCK, vocab_size), BLOCK):
        entries = start + tl.arange(0, BLOCK)
        scores = tl.load(logits + entries, mask=entries < vocab_size, other=float("-inf")).to(tl.float32)
        if heat > 0:
            scores = scores / heat + _gumbel(entries, key)
        where = tl.where(scores > best, entries, where)  # of equal scores the first stays
        best = tl.maximum(scores, best)
    top = tl.max(best)
    tl.store(values + row * num_pieces + piece, top)
    tl.store(indices + row * num_pieces + piece, tl.min(tl.where(best == top, where, vocab_size - 1)))


@triton.jit(do_not_specialize=["num_pieces"])
def _best_of_row_kernel(values, indices, out, num_pieces, MAX_PIECES: tl.constexpr):
    wait_for_inputs()
    row = tl.program_id(0)
    pieces = tl.arange(0, MAX_PIECES)
    inside = pieces < num_pieces
    value = tl.load(values + row * num_pieces + pieces, mask=inside, other=float("-inf"))
    index = tl.load(indices + row * num_pieces + pieces, mask=inside, other=2147483647)
    tl.store(out + row, tl.min(tl.where(value == tl.max(value), index, 2147483647)).to(tl.int64))


def sample_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    positions: torch.Tensor,
    *,
    truncates: bool,
) -> torch.Tensor:
    if truncates:
        logits = _truncated(logits, temperature, top_k, top_p, min_p)
    num_rows, vocab_size = logits.shape
    piece_blocks, num_pieces = _pieces(num_rows, vocab_size)
    values = torch.empty(num_rows, num_pieces, dtype=torch.float32, device=logits.device)
    indices = torch.empty(num_rows, num_pieces, dtype=torch.int32, device=logits.device)
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    _best_of_piece_kernel[(num_pieces, num_rows)](
        logits, temperature, seed, positions, values, indices, vocab_size, logits.stride(0), piece_blocks,
        num_pieces, BLOCK, num_warps=NUM_WARPS, **OVERLAP,
    )  # fmt: skip
    _best_of_row_kernel[(num_rows,)](values, indices, out, num_pieces, MAX_PIECES, num_warps=1, **OVERLAP)
    return out


def _pieces(num_rows: int, vocab_size: int) -> tuple[int, int]:
    """(blocks of a piece, pieces of a row): enough programs to fill the device, and no more reductions."""
    blocks = triton.cdiv(vocab_size, BLOCK)
    wanted = max(1, min(blocks, MAX_PIECES, PROGRAMS_WANTED // num_rows))
    piece_blocks = triton.cdiv(blocks, wanted)
    return piece_blocks, triton.cdiv(blocks, piece_blocks)


def _truncated(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """logits with what top-k, top-p and min-p exclude at −inf; temperature is not yet applied to the rest."""
    heat = torch.where(temperature == 0, 1.0, temperature)[:, None]
    kept = truncate_logits(logits.float() / heat, top_k, top_p, min_p) > -torch.inf
    return logits.float().masked_fill(~kept & (temperature > 0)[:, None], -torch.inf)
