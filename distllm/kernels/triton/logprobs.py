"""Log-probabilities without the softmax: one pass over a row finds log Σ exp, a token's rank and the best.

Each of a row's programs takes a piece of the vocabulary and leaves the piece's best in order; a second kernel
joins the pieces, as one merges sorted lists.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs
from distllm.kernels.triton.online_softmax import LOG2E
from distllm.kernels.triton.ordered import ordered

LEAST_BLOCK = 1024  # entries of a piece
MAX_PIECES = 64
MOST_TOP = 20  # above it torch is quicker
NOTHING = tl.constexpr(-(2**63))  # below the key of every logit
LAST_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _key(x, entries):
    """Of a logit and its token: in the order of the logits, of equal ones the lowest id first."""
    return (ordered(x.to(tl.int32, bitcast=True), 0).to(tl.int64) << 32) | (entries ^ LAST_ID)


@triton.jit
def _logit(key):
    return ordered((key >> 32).to(tl.int32), 0).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_top"])
def _piece_kernel(
    logits, token_ids, largests, totals, counts, bests, vocab_size, row_stride, num_top, BLOCK: tl.constexpr
):
    """Of a piece of a row: its largest logit, Σ exp(x − it), how many exceed the token's, the best ones."""
    wait_for_inputs()
    piece, row = tl.program_id(0), tl.program_id(1)
    logits += row.to(tl.int64) * row_stride
    chosen = tl.load(logits + tl.load(token_ids + row)).to(tl.float32)
    entries = piece * BLOCK + tl.arange(0, BLOCK)
    inside = entries < vocab_size
    x = tl.load(logits + entries, mask=inside, other=float("-inf")).to(tl.float32)
    largest = tl.maximum(tl.max(x), -1e38)  # finite: −inf − (−inf) would be no number
    out = row * tl.num_programs(0) + piece
    tl.store(largests + out, largest)
    tl.store(totals + out, tl.sum(tl.exp2((x - largest) * LOG2E)))
    tl.store(counts + out, tl.sum((x > chosen).to(tl.int32)))
    keys = tl.where(inside, _key(x, entries), NOTHING)
    for i in range(num_top):
        best = tl.max(keys)
        tl.store(bests + out.to(tl.int64) * num_top + i, best)
        keys = tl.where(keys == best, NOTHING, keys)


@triton.jit(do_not_specialize=["num_top", "num_pieces"])
def _join_kernel(
    logits, token_ids, largests, totals, counts, bests, chosen_logprobs, ranks, top_ids, top_logprobs,
    row_stride, num_top, num_pieces, MAX_PIECES: tl.constexpr,
):  # fmt: skip
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    pieces = tl.arange(0, MAX_PIECES)
    places, inside = row * num_pieces + pieces, pieces < num_pieces
    largest = tl.load(largests + places, mask=inside, other=-1e38)
    top = tl.max(largest)
    total = tl.load(totals + places, mask=inside, other=0.0)
    norm = top + tl.log(tl.sum(total * tl.exp2((largest - top) * LOG2E)))
    chosen = tl.load(logits + row * row_stride + tl.load(token_ids + row)).to(tl.float32)
    tl.store(chosen_logprobs + row, chosen - norm)
    tl.store(ranks + row, tl.sum(tl.load(counts + places, mask=inside, other=0)).to(tl.int64) + 1)
    bests += places.to(tl.int64) * num_top
    num_taken = tl.zeros([MAX_PIECES], tl.int32)  # from each piece
    for i in range(num_top):
        keys = tl.load(bests + num_taken, mask=inside & (num_taken < num_top), other=NOTHING)
        best = tl.max(keys)
        tl.store(top_ids + row * num_top + i, (best & LAST_ID) ^ LAST_ID)
        tl.store(top_logprobs + row * num_top + i, _logit(best) - norm)
        num_taken += (keys == best).to(tl.int32)


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if num_top <= MOST_TOP:
        return _token_logprobs(logits, token_ids, num_top)
    best = logits.topk(num_top, dim=-1)
    logprob, rank, _, top = _token_logprobs(logits, token_ids, 1)
    values = best.values.float()
    return logprob, rank, best.indices, values - values[:, :1] + top


def _token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (num_rows, vocab_size), device = logits.shape, logits.device
    block = max(LEAST_BLOCK, triton.next_power_of_2(triton.cdiv(vocab_size, MAX_PIECES)))
    num_pieces = triton.cdiv(vocab_size, block)
    largests = torch.empty(num_rows, num_pieces, dtype=torch.float32, device=device)
    totals = torch.empty_like(largests)
    counts = torch.empty(num_rows, num_pieces, dtype=torch.int32, device=device)
    bests = torch.empty(num_rows, num_pieces, num_top, dtype=torch.int64, device=device)
    _piece_kernel[(num_pieces, num_rows)](
        logits, token_ids, largests, totals, counts, bests, vocab_size, logits.stride(0), num_top, block,
        **OVERLAP,
    )  # fmt: skip
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=device)
    ranks = torch.empty(num_rows, dtype=torch.int64, device=device)
    top_ids = torch.empty(num_rows, num_top, dtype=torch.int64, device=device)
    top_logprobs = torch.empty(num_rows, num_top, dtype=torch.float32, device=device)
    _join_kernel[(num_rows,)](
        logits, token_ids, largests, totals, counts, bests, logprobs, ranks, top_ids, top_logprobs,
        logits.stride(0), num_top, num_pieces, MAX_PIECES, num_warps=1, **OVERLAP,
    )  # fmt: skip
    return logprobs, ranks, top_ids, top_logprobs
