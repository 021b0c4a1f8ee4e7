"""What a grammar forbids, as packed bits, into logits."""

from __future__ import annotations

import torch


def mask_logits(logits: torch.Tensor, masks: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """logits with −inf wherever the mask of a row has no bit; the input is kept.

    logits: [num_rows, vocab_size], any row stride. masks: [num_masks, width] uint8, one bit for each id, the
    lowest first, 8 · width ≥ vocab_size. numbers: [num_rows] int64, each row's mask, −1 for none.
    """
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = ((masks[:, :, None] & bits) != 0).flatten(1)[:, : logits.shape[1]]
    free = (numbers < 0)[:, None]
    return logits.masked_fill(~(free | allowed[numbers.clamp(min=0)]), -torch.inf)
