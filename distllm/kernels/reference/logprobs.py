"""Log-probabilities under the model's own distribution: no temperature, nothing excluded."""

from __future__ import annotations

import torch


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the tokens and of the num_top best.

    logits: [n, vocab], any row stride. token_ids: [n] int64.
    Returns (logprob [n] fp32, rank [n] int64 with 1 the best, top_ids [n, num_top] int64, top_logprobs fp32).
    """
    chosen = logits.gather(-1, token_ids[:, None])
    norm = logits.float().logsumexp(-1, keepdim=True)
    top = logits.topk(num_top, dim=-1)
    rank = (logits > chosen).sum(-1) + 1
    return (chosen.float() - norm)[:, 0], rank, top.indices, top.values.float() - norm
