"""Vocabulary lookup on a rank that holds some of the rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def embed(token_ids: torch.Tensor, weight: torch.Tensor, first_row: int) -> torch.Tensor:
    """Rows of the vocabulary for the ids that this rank holds, zero for the others.

    token_ids: [num_tokens] int; weight: [rows, hidden_size], row i belonging to token first_row + i.
    """
    local = token_ids - first_row
    elsewhere = (local < 0) | (local >= weight.shape[0])
    return F.embedding(local.masked_fill(elsewhere, 0), weight).masked_fill_(elsewhere[:, None], 0)
