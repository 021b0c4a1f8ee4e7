"""Argmax and Gumbel-max over the vocabulary in one pass: no softmax, no noise tensor, no sort.

The noise is the hash of `kernels.reference.sampling`, in 32-bit arithmetic. A row's programs each take a piece of
the vocabulary; a second, tiny kernel takes the best of the pieces, the lowest token id where values tie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distllm.kernels.reference.sampling import truncate_logits

PIECE = 4096


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
def _best_of_piece_kernel(
    logits,
    temperature,
    seed,
    positions,
    values,
    indices,
    vocab_size,
    row_stride,
    num_pieces,
    PIECE: tl.constexpr,
):
    row, piece = tl.program_id(0), tl.program_id(1)
    entries = piece * PIECE + tl.arange(0, PIECE)
    inside = entries < vocab_size
    scores = tl.load(logits + row.to(tl.int64) * row_stride + entries, mask=inside, other=float("-inf")).to(
        tl.float32
    )
    heat = tl.load(temperature + row)
    if heat > 0:
        position = tl.load(positions + row).to(tl.uint64, bitcast=True)
        key = _mix64(
            _mix64(tl.load(seed + row).to(tl.uint64, bitcast=True)) + (position + 1) * 0x9E3779B97F4A7C15
        )
        bits = _mix32(entries.to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32))
        bits = _mix32(bits ^ (key >> 32).to(tl.uint32))
        uniform = ((bits >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08  # 2⁻²⁴
        scores = scores / heat - tl.log(-tl.log(uniform))
    best = tl.max(scores)
    tl.store(values + row * num_pieces + piece, best)
    # A row of −inf alone still yields an entry of this piece.
    tl.store(
        indices + row * num_pieces + piece,
        tl.min(tl.where((scores == best) & inside, entries, vocab_size - 1)),
    )


@triton.jit
def _best_of_row_kernel(values, indices, out, num_pieces, PIECES: tl.constexpr):
    row = tl.program_id(0)
    pieces = tl.arange(0, PIECES)
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
    num_pieces = triton.cdiv(vocab_size, PIECE)
    values = torch.empty(num_rows, num_pieces, dtype=torch.float32, device=logits.device)
    indices = torch.empty(num_rows, num_pieces, dtype=torch.int32, device=logits.device)
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    _best_of_piece_kernel[(num_rows, num_pieces)](
        logits,
        temperature,
        seed,
        positions,
        values,
        indices,
        vocab_size,
        logits.stride(0),
        num_pieces,
        PIECE,
        num_warps=8,
    )
    _best_of_row_kernel[(num_rows,)](values, indices, out, num_pieces, triton.next_power_of_2(num_pieces))
    return out


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
