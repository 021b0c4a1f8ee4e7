"""Repetition, presence and frequency penalties: what a row's text has said already."""

from __future__ import annotations

import torch

COLUMNS = 8192  # of the token table that are counted at a time, which bounds memory


def penalize(
    logits: torch.Tensor,
    rows: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    num_prompt: torch.Tensor,
    penalties: torch.Tensor,
) -> None:
    """In place, the logits of some rows: those of tokens in prompt or output are divided by the repetition
    penalty where they are positive, else multiplied; then each token of the output loses its frequency times
    the frequency penalty, and once the presence penalty.

    logits: [batch, vocab_size] fp32, contiguous. rows: [n] int64, none twice. table: [slots, max_len] int32,
    contiguous. slots, lengths, num_prompt: [n] int64; the text of rows[i] is table[slots[i], :lengths[i]],
    the first num_prompt[i] of it the prompt. penalties: [3, n] fp32, contiguous: repetition, presence,
    frequency.
    """
    seen, generated = _count(table, slots, lengths, num_prompt, logits.shape[1])
    repetition, presence, frequency = penalties[:, :, None]
    values = logits[rows]
    repeated = torch.where(values > 0, values / repetition, values * repetition)
    values = torch.where(seen > 0, repeated, values)
    logits[rows] = values - frequency * generated - presence * (generated > 0)


def _count(
    table: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    num_prompt: torch.Tensor,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each token is in prompt and output, and in the output: [n, vocab_size] int32."""
    num_rows, device = len(slots), table.device
    counts = torch.zeros(2, num_rows, vocab_size + 1, dtype=torch.int32, device=device)  # the last: no token
    for start in range(0, table.shape[1], COLUMNS):
        tokens = table[slots, start : start + COLUMNS].long()
        places = torch.arange(start, start + tokens.shape[1], device=device)
        known = torch.where(places < lengths[:, None], tokens, vocab_size)
        ones = torch.ones_like(known, dtype=torch.int32)
        counts[0].scatter_add_(1, known, ones)
        counts[1].scatter_add_(1, known.masked_fill(places < num_prompt[:, None], vocab_size), ones)
    return counts[0, :, :vocab_size], counts[1, :, :vocab_size]
