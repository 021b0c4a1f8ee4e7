"""Which tokens may be drawn at all: min_p, top_k and top_p of a row, as one border on its logits."""

from __future__ import annotations

import torch


def lowest_kept(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """The border of each row: min_p, then top_k, then top_p (over what is left) keep the logits ≥ it.

    It applies to logits as they are, before temperature; ties at it stay. −inf in rows of temperature 0, and
    in rows that ask for no truncation. [num_rows] fp32.
    logits: [num_rows, vocab], any row stride. temperature, top_p, min_p: fp32; top_k: int64, 0 for all; each
    [num_rows], contiguous.
    """
    wide, vocab_size = logits.double(), logits.shape[-1]
    heat = torch.where(temperature == 0, 1.0, temperature.double())[:, None]
    ordered = wide.sort(-1, descending=True).values
    best = ordered[:, :1]
    lowest = best + heat * min_p.double().log()[:, None]
    last = (top_k.clamp(max=vocab_size) - 1).clamp(min=0)
    limited = ((top_k > 0) & (top_k < vocab_size))[:, None]
    lowest = torch.where(limited, lowest.maximum(ordered.gather(-1, last[:, None])), lowest)
    mass = torch.where(ordered >= lowest, ((ordered - best) / heat).exp(), 0.0).cumsum(-1)
    enough = mass >= top_p.double()[:, None] * mass[:, -1:]
    nucleus = ordered.gather(-1, enough.int().argmax(-1, keepdim=True))  # up to the first sum that suffices
    lowest = torch.where((top_p < 1)[:, None], nucleus, lowest)
    return torch.where(temperature == 0, -torch.inf, lowest[:, 0]).float()
