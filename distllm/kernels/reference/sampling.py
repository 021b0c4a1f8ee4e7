"""Choosing the next token, row by row. A row's choice depends on its own logits, parameters, seed and
position only.

Sampling is Gumbel-max: argmax(logits / temperature + noise), where the noise of a vocabulary entry is a hash
of (seed, position, entry). No state advances, so neither the batch, nor the layout, nor a restart can change
a result; and the best of each shard of the vocabulary is all that the best of the whole is found from.
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


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """[num_rows, num_entries] fp32 Gumbel noise, a function of (seed, position, vocabulary entry).

    seeds, positions: [num_rows] int64; entries: [num_entries] int64. Computed in fp64 and rounded once, so
    that no vector width shows.
    """
    key = _mix64(_mix64(seeds) + (positions + 1) * _GOLDEN64)
    bits = _mix32((entries * _GOLDEN32 + (key & _MASK32)[:, None]) & _MASK32)
    bits = _mix32(bits ^ _shift_right(key, 32)[:, None])
    uniform = ((bits >> 8).double() + 0.5) * 2.0**-24
    return -(-uniform.log()).log().float()


def best_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    positions: torch.Tensor,
    lowest: torch.Tensor | None = None,
    *,
    first_entry: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What sample_tokens chooses from one shard of the vocabulary, and the score that it has to win by.

    logits: [num_rows, shard]; column j is vocabulary entry first_entry + j. A shard may be empty, or padded
    with −inf. The rest as in sample_tokens, lowest being that of the whole vocabulary.
    Returns (scores [num_rows] fp32, token_ids [num_rows] int64): the lowest id where scores tie.
    """
    num_rows, num_entries = logits.shape
    if num_entries == 0:
        return temperature.new_full((num_rows,), -torch.inf), seed.new_full((num_rows,), first_entry)
    scores, greedy = logits.float(), temperature == 0
    if lowest is not None:
        scores = scores.masked_fill(scores < lowest[:, None], -torch.inf)
    if not greedy.all():
        entries = torch.arange(first_entry, first_entry + num_entries, device=logits.device)
        rate = 1 / torch.where(greedy, 1.0, temperature)
        drawn = scores * rate[:, None] + gumbel_noise(seed, positions, entries)
        scores = torch.where(greedy[:, None], scores, drawn)
    best = scores.max(-1)
    return best.values, best.indices + first_entry


def choose_best(scores: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The token of the highest score, the lowest id where scores tie. [num_rows] int64.

    scores fp32, token_ids int64: [num_shards, num_rows], contiguous, what best_tokens gave for each shard.
    """
    beaten = scores < scores.amax(0)
    return token_ids.masked_fill(beaten, torch.iinfo(torch.int64).max).amin(0)


def sample_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    positions: torch.Tensor,
    lowest: torch.Tensor | None = None,
) -> torch.Tensor:
    """The next token of each row: argmax where temperature is 0, Gumbel-max elsewhere. [num_rows] int64.

    logits: [num_rows, vocab], any row stride. temperature: fp32; seed, positions (of the new token): int64;
    lowest: lowest_kept's, or None where no row excludes anything; all [num_rows], contiguous.
    """
    return best_tokens(logits, temperature, seed, positions, lowest)[1]
