"""Sampling against Python integers, NumPy in fp64 and the statistics that it must have."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distllm.kernels.reference.logprobs import token_logprobs
from distllm.kernels.reference.sampling import best_tokens, choose_best, gumbel_noise, sample_tokens
from distllm.kernels.reference.truncation import lowest_kept
from tests.sampling_cases import check_kept, chi_square_passes, hard_rows, kept_by_hand, shards


def hash_by_hand(seed: int, position: int, entry: int) -> int:
    """The 32-bit hash in unbounded Python integers."""

    def mix64(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    def mix32(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
        return x ^ (x >> 16)

    key = mix64((mix64(seed % 2**64) + (position + 1) * 0x9E3779B97F4A7C15) % 2**64)
    low, high = key % 2**32, key >> 32
    return mix32(mix32((entry * 0x9E3779B1 + low) % 2**32) ^ high)


def test_noise_is_the_documented_hash() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345]
    positions = [0, 1, 5, 1000, 131071, 2**31]
    entries = torch.tensor([0, 1, 17, 299, 151935])
    noise = gumbel_noise(torch.tensor(seeds), torch.tensor(positions), entries)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        for column, entry in enumerate(entries.tolist()):
            uniform = ((hash_by_hand(seed, position, entry) >> 8) + 0.5) / 2**24
            assert noise[row, column].item() == pytest.approx(
                -math.log(-math.log(uniform)), rel=1e-6, abs=1e-6
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 17, 1000, 1031])
def test_truncation_keeps_what_fp64_keeps(vocab: int, dtype: torch.dtype) -> None:
    for seed in range(5):
        logits, columns = hard_rows(vocab, dtype, seed)
        check_kept(lowest_kept(logits, *columns), logits, columns, epsilon=1e-9)


def test_a_row_of_minus_infinity_has_no_border() -> None:
    column = torch.ones(2)
    lowest = lowest_kept(torch.full((2, 9), -torch.inf), column, column.long(), column / 2, column / 2)
    assert lowest.tolist() == [-math.inf] * 2


def draw(logits: torch.Tensor, count: int, **overrides: float) -> torch.Tensor:
    """count samples of one distribution, one seed each."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | overrides
    temperature, top_k, top_p, min_p = (torch.full((count,), value) for value in values.values())
    rows = logits.expand(count, -1)
    lowest = lowest_kept(rows[:1], temperature[:1], top_k[:1].long(), top_p[:1], min_p[:1]).expand(count)
    return sample_tokens(rows, temperature, torch.arange(count) * 7919, torch.arange(count) % 13, lowest)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2, "temperature": 1.7},
        {"min_p": 0.05, "top_k": 7, "top_p": 0.8, "temperature": 1.3},
    ],
)
def test_draws_follow_the_distribution(overrides: dict[str, float]) -> None:
    """Chi-square over 12 tokens at 100,000 draws."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    wide = logits.double().numpy()
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | overrides
    weights = np.exp(wide / values["temperature"]) * kept_by_hand(wide, *values.values())
    counts = np.bincount(draw(logits, 100_000, **overrides).numpy(), minlength=12)
    assert chi_square_passes(counts, weights / weights.sum())


def test_draws_at_many_positions_follow_the_distribution() -> None:
    """As one sequence draws: one seed, a position each."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(4)) * 2
    kept = kept_by_hand(logits.double().numpy(), 0.8, 12, 0.95, 0.0)
    weights = np.exp(logits.double().numpy() / 0.8) * kept
    one = torch.ones(5000)
    lowest = one * logits[torch.from_numpy(kept)].min()
    ids = sample_tokens(logits.expand(5000, -1), one * 0.8, one.long() * 77, torch.arange(5000), lowest)
    assert chi_square_passes(np.bincount(ids.numpy(), minlength=50), weights / weights.sum())


@pytest.mark.parametrize("num_shards", range(1, 9))
@pytest.mark.parametrize("vocab", [1, 5, 131, 1031])
def test_shards_choose_what_the_whole_chooses(vocab: int, num_shards: int) -> None:
    logits, (temperature, *truncation) = hard_rows(vocab, torch.bfloat16)
    logits[::7] = -torch.inf
    seed, positions = torch.randint(-(2**62), 2**62, (36,)), torch.randint(0, 5000, (36,))
    for lowest in (None, lowest_kept(logits, temperature, *truncation)):
        args = (temperature, seed, positions, lowest)
        want_scores, want = best_tokens(logits, *args)
        assert torch.equal(want, sample_tokens(logits, *args))
        for pads in (False, True):
            parts = [
                best_tokens(shard, *args, first_entry=first)
                for first, shard in shards(logits, num_shards, pads=pads)
            ]
            scores, token_ids = (torch.stack(part) for part in zip(*parts, strict=True))
            assert torch.equal(choose_best(scores, token_ids), want)
            assert torch.equal(scores.amax(0), want_scores)


def test_a_row_does_not_see_its_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(32, 515) * 4
    args = [
        torch.rand(32) * torch.tensor([0.0, 1.0]).repeat(16),
        torch.randint(0, 50, (32,)),
        torch.rand(32) * 0.5 + 0.5,
        torch.rand(32) * 0.1,
        torch.randint(-(2**62), 2**62, (32,)),
        torch.randint(0, 1000, (32,)),
    ]

    def choose(logits: torch.Tensor, *columns: torch.Tensor) -> torch.Tensor:
        temperature, top_k, top_p, min_p, seed, positions = columns
        lowest = lowest_kept(logits, temperature, top_k, top_p, min_p)
        return sample_tokens(logits, temperature, seed, positions, lowest)

    together = choose(logits, *args)
    for row in range(32):
        alone = choose(logits[row : row + 1], *[a[row : row + 1] for a in args])
        assert alone.item() == together[row].item()
    greedy = args[0] == 0
    assert torch.equal(together[greedy], logits[greedy].argmax(-1))


def test_logprobs_match_fp64() -> None:
    torch.manual_seed(1)
    logits = torch.randn(9, 77) * 3
    tokens = torch.randint(0, 77, (9,))
    logprob, rank, top_ids, top = token_logprobs(logits, tokens, 5)
    exact = logits.double().numpy()
    exact = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    for row, token in enumerate(tokens.tolist()):
        order = np.argsort(-exact[row])
        assert logprob[row].item() == pytest.approx(exact[row, token], abs=1e-5)
        assert rank[row].item() == list(order).index(token) + 1
        assert top_ids[row].tolist() == order[:5].tolist()
        np.testing.assert_allclose(top[row].numpy(), exact[row][order[:5]], atol=1e-5)
