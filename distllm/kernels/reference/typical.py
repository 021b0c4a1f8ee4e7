"""Locally typical sampling (Meister et al. 2023)."""

from __future__ import annotations

import torch


def keep_typical(
    logits: torch.Tensor, temperature: torch.Tensor, lowest: torch.Tensor | None, typical_p: torch.Tensor
) -> torch.Tensor:
    """Of what lowest_kept leaves, the tokens whose surprise is nearest to the entropy, as many as reach the
    mass typical_p; the logits of the others become −inf. Rows of temperature 0 or typical_p 1 stay as they
    are. The input is kept.

    logits: [num_rows, vocab], any row stride. temperature, typical_p, lowest: [num_rows] fp32, contiguous.
    """
    asks = (temperature > 0) & (typical_p < 1)
    scores = logits.float() / torch.where(asks, temperature, 1.0)[:, None]
    if lowest is not None:
        scores = scores.masked_fill(logits < lowest[:, None], -torch.inf)
    surprise = -scores.log_softmax(-1)
    probs = (-surprise).exp()
    entropy = torch.where(probs > 0, probs * surprise, 0.0).sum(-1, keepdim=True)
    distance = (surprise - entropy).abs()
    ordered, order = distance.sort(dim=-1, stable=True)
    short = (probs.gather(-1, order).cumsum(-1) < typical_p[:, None]).sum(-1, keepdim=True)
    farthest = ordered.gather(-1, short.clamp(max=logits.shape[-1] - 1))
    return logits.masked_fill(asks[:, None] & (distance > farthest), -torch.inf)
