"""Penalties where a row's text has tokens, and nowhere else: the vocabulary is not read.

One kernel counts the tokens of the texts. In the next one, of all the places that hold the same token the
first to take its count changes its logit; the others find nothing left.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs

BLOCK = 1024  # tokens of a text for one program


@triton.jit
def _tokens(table, slots, row, places, length, table_stride):
    slot = tl.load(slots + row)
    return tl.load(table + slot * table_stride + places, mask=places < length, other=0)


@triton.jit(do_not_specialize=["table_stride"])
def _count_kernel(table, slots, lengths, num_prompt, counts, vocab_size, table_stride, BLOCK: tl.constexpr):
    """Adds 2 for each time that a token is in the output, and sets the lowest bit if it is in the prompt."""
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(lengths + row)
    if tl.program_id(1) * BLOCK < length:
        known, prompted = places < length, places < tl.load(num_prompt + row)
        count = counts + row * vocab_size + _tokens(table, slots, row, places, length, table_stride)
        tl.atomic_or(count, 1, mask=known & prompted, sem="relaxed")
        tl.atomic_add(count, 2, mask=known & ~prompted, sem="relaxed")


@triton.jit(do_not_specialize=["table_stride", "num_rows"])
def _penalize_kernel(
    logits, rows, table, slots, lengths, penalties, counts, vocab_size, table_stride, num_rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(lengths + row)
    if tl.program_id(1) * BLOCK < length:
        tokens = _tokens(table, slots, row, places, length, table_stride)
        count = tl.atomic_xchg(counts + row * vocab_size + tokens, 0, mask=places < length, sem="relaxed")
        is_first = (places < length) & (count > 0)
        penalty = penalties + row
        repetition, presence = tl.load(penalty), tl.load(penalty + num_rows)
        frequency = tl.load(penalty + 2 * num_rows)
        logit = logits + tl.load(rows + row) * vocab_size + tokens
        x = tl.load(logit, mask=is_first, other=0.0)
        x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        x -= frequency * (count >> 1).to(tl.float32) + tl.where(count > 1, presence, 0.0)
        tl.store(logit, x, mask=is_first)


def penalize(
    logits: torch.Tensor,
    rows: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    num_prompt: torch.Tensor,
    penalties: torch.Tensor,
) -> None:
    num_rows, (_, vocab_size), max_len = len(rows), logits.shape, table.shape[1]
    assert logits.is_contiguous() and table.is_contiguous() and penalties.is_contiguous()
    counts = torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=logits.device)
    grid = (num_rows, triton.cdiv(max_len, BLOCK))
    _count_kernel[grid](table, slots, lengths, num_prompt, counts, vocab_size, max_len, BLOCK, **OVERLAP)
    _penalize_kernel[grid](
        logits, rows, table, slots, lengths, penalties, counts, vocab_size, max_len, num_rows, BLOCK,
        **OVERLAP,
    )  # fmt: skip
