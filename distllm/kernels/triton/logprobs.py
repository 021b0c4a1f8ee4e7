"""Log-probabilities without the softmax: one pass over a row gives its log Σ exp and a token's rank.

A row's programs each take a piece of the vocabulary, as in `triton.sampling`; a second kernel joins them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs
from distllm.kernels.triton.online_softmax import LOG2E
from distllm.kernels.triton.sampling import BLOCK, MAX_PIECES, NUM_WARPS, row_pieces

LEAST = tl.constexpr(-1e38)  # finite: −inf − (−inf) would be no number


@triton.jit
def _join(largest, total):
    """The largest of all lanes, and the sum of exp(x − it), of lanes that each hold theirs."""
    top = tl.max(largest)
    return top, tl.sum(total * tl.exp2((largest - top) * LOG2E))


@triton.jit(do_not_specialize=["piece_blocks"])
def _piece_kernel(
    logits, token_ids, largests, totals, counts, vocab_size, row_stride, piece_blocks, BLOCK: tl.constexpr
):
    """Of one piece of a row: its largest logit, the sum of exp(x − it), how many exceed the token's."""
    wait_for_inputs()
    piece, row = tl.program_id(0), tl.program_id(1)
    first = piece * piece_blocks * BLOCK
    logits += row.to(tl.int64) * row_stride
    chosen = tl.load(logits + tl.load(token_ids + row))
    largest = tl.full([BLOCK], LEAST, tl.float32)
    total, count = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    for start in range(first, tl.minimum(first + piece_blocks * BLOCK, vocab_size), BLOCK):
        entries = start + tl.arange(0, BLOCK)
        x = tl.load(logits + entries, mask=entries < vocab_size, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, x)
        total = total * tl.exp2((largest - larger) * LOG2E) + tl.exp2((x - larger) * LOG2E)
        count += (x > chosen.to(tl.float32)).to(tl.int32)
        largest = larger
    top, mass = _join(largest, total)
    out = piece * tl.num_programs(1) + row
    tl.store(largests + out, top)
    tl.store(totals + out, mass)
    tl.store(counts + out, tl.sum(count))


@triton.jit(do_not_specialize=["num_pieces"])
def _join_kernel(largests, totals, counts, norms, ranks, num_pieces, MAX_PIECES: tl.constexpr):
    wait_for_inputs()
    row = tl.program_id(0)
    pieces = tl.arange(0, MAX_PIECES)
    places, inside = pieces * tl.num_programs(0) + row, pieces < num_pieces
    largest = tl.load(largests + places, mask=inside, other=LEAST)
    top, mass = _join(largest, tl.load(totals + places, mask=inside, other=0.0))
    tl.store(norms + row, top + tl.log(mass))
    tl.store(ranks + row, tl.sum(tl.load(counts + places, mask=inside, other=0)).to(tl.int64) + 1)


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    norm, rank = _norm_and_rank(logits, token_ids)
    chosen = logits.gather(-1, token_ids[:, None])[:, 0]
    top = logits.topk(num_top, dim=-1)
    return chosen.float() - norm, rank, top.indices, top.values.float() - norm[:, None]


def _norm_and_rank(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log Σ exp [n] fp32, rank of the token [n] int64, 1 the best)."""
    num_rows, vocab_size = logits.shape
    piece_blocks, num_pieces = row_pieces(num_rows, vocab_size)
    floats = torch.empty(2, num_pieces, num_rows, dtype=torch.float32, device=logits.device)
    counts = torch.empty(num_pieces, num_rows, dtype=torch.int32, device=logits.device)
    norm = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    rank = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    _piece_kernel[(num_pieces, num_rows)](
        logits, token_ids, floats[0], floats[1], counts, vocab_size, logits.stride(0), piece_blocks, BLOCK,
        num_warps=NUM_WARPS, **OVERLAP,
    )  # fmt: skip
    _join_kernel[(num_rows,)](
        floats[0], floats[1], counts, norm, rank, num_pieces, MAX_PIECES, num_warps=1, **OVERLAP
    )
    return norm, rank
