"""Choosing the next token, row by row. A row's choice depends on its own logits, parameters, seed and
position only.

Sampling is Gumbel-max: argmax(logits / temperature + noise), where the noise of a vocabulary entry is a hash
of (seed, position, entry). No state advances, so neither the batch, nor the layout, nor a restart can change
a result.
"""

from __future__ import annotations

import torch

_MASK32 = 0xFFFFFFFF
_GOLDEN64 = 0x9E3779B97F4A7C15 - 2**64  # as a signed 64-bit integer
_GOLDEN32 = 0x9E3779B1


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of a signed 64-bit integer."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ _shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift_right(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift_right(x, 31)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of MurmurHash3, on 32-bit values held in int64."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[num_rows, vocab_size] fp32 Gumbel noise, a function of (seed, position, vocabulary entry).

    seeds, positions: [num_rows] int64. Computed in fp64 and rounded once, so that no vector width shows.
    """
    key = _mix64(_mix64(seeds) + (positions + 1) * _GOLDEN64)
    entries = torch.arange(vocab_size, device=seeds.device) * _GOLDEN32
    bits = _mix32((entries + (key & _MASK32)[:, None]) & _MASK32)
    bits = _mix32(bits ^ _shift_right(key, 32)[:, None])
    uniform = ((bits >> 8).double() + 0.5) * 2.0**-24
    return -(-uniform.log()).log().float()


def truncate_logits(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Set to −inf what min_p, then top_k, then top_p (over what is left) exclude; ties at a border stay.

    logits: [num_rows, vocab] fp32, temperature applied. top_k: [num_rows] int64, 0 for all; top_p, min_p:
    fp32.
    """
    best = logits.amax(-1, keepdim=True)
    logits = logits.masked_fill(logits < best + min_p.log()[:, None], -torch.inf)
    ordered = logits.sort(-1, descending=True).values
    vocab_size = logits.shape[-1]
    last = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size) - 1
    ordered = ordered.masked_fill(ordered < ordered.gather(-1, last[:, None]), -torch.inf)
    probs = ordered.softmax(-1)
    # top_p 1 keeps all by itself: a rounded cumulative sum may reach 1 before the last entry.
    kept = ((probs.cumsum(-1) - probs < top_p[:, None]) | (top_p >= 1)[:, None]) & (ordered > -torch.inf)
    lowest = ordered.gather(-1, kept.sum(-1, keepdim=True).clamp(min=1) - 1)
    return logits.masked_fill(logits < lowest, -torch.inf)


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
    """The next token of each row: argmax where temperature is 0, Gumbel-max elsewhere. [num_rows] int64.

    logits: [num_rows, vocab]. positions: of the new token, [num_rows] int64. truncates: whether any row
    has top_k, top_p or min_p set; known on the host, so that batches without them pay nothing.
    """
    logits, greedy = logits.float(), temperature == 0
    best = logits.argmax(-1)
    if greedy.all():
        return best
    scaled = logits / torch.where(greedy, 1.0, temperature)[:, None]
    if truncates:
        scaled = truncate_logits(scaled, top_k, top_p, min_p)
    noise = gumbel_noise(seed, positions, logits.shape[-1])
    return torch.where(greedy, best, (scaled + noise).argmax(-1))


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the tokens and of the num_top best.

    Returns (logprob [n] fp32, rank [n] int64 with 1 the best, top_ids [n, num_top] int64, top_logprobs fp32).
    """
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, token_ids[:, None])
    top = logprobs.topk(num_top, dim=-1)
    return chosen[:, 0], (logprobs > chosen).sum(-1) + 1, top.indices, top.values
