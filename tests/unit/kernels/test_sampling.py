"""Sampling against Python integers, NumPy in fp64 and the statistics that it must have."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distllm.kernels.reference.sampling import gumbel_noise, sample_tokens, token_logprobs, truncate_logits


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
    noise = gumbel_noise(torch.tensor(seeds), torch.tensor(positions), 300)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        for entry in (0, 1, 17, 299):
            uniform = ((hash_by_hand(seed, position, entry) >> 8) + 0.5) / 2**24
            assert noise[row, entry].item() == pytest.approx(
                -math.log(-math.log(uniform)), rel=1e-6, abs=1e-6
            )


def keep_by_hand(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """min_p, then top_k, then top_p over what is left, in fp64, one row."""
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    kept = set(np.flatnonzero(probs >= min_p * probs.max()))
    if top_k > 0:
        border = sorted((probs[i] for i in kept), reverse=True)[:top_k][-1]
        kept = {i for i in kept if probs[i] >= border}
    if top_p < 1:
        total, mass, nucleus = sum(probs[i] for i in kept), 0.0, set()
        for i in sorted(kept, key=lambda i: -probs[i]):
            if mass >= top_p:
                break
            nucleus.add(i)
            mass += probs[i] / total
        kept = nucleus
    return kept


def test_truncation_keeps_what_fp64_keeps() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        vocab = int(rng.integers(1, 200))
        rows = int(rng.integers(1, 8))
        logits = rng.normal(0, 3, (rows, vocab)).astype(np.float32)
        top_k = rng.choice([0, 1, 2, 5, 50, 1000], rows)
        top_p = rng.choice([0.01, 0.3, 0.9, 0.999, 1.0], rows)
        min_p = rng.choice([0.0, 0.01, 0.3, 1.0], rows)
        cut = truncate_logits(
            torch.from_numpy(logits),
            torch.from_numpy(top_k),
            torch.from_numpy(top_p).float(),
            torch.from_numpy(min_p).float(),
        )
        for row in range(rows):
            expected = keep_by_hand(logits[row].astype(np.float64), top_k[row], top_p[row], min_p[row])
            assert set(torch.isfinite(cut[row]).nonzero()[:, 0].tolist()) == expected


def draw(logits: torch.Tensor, count: int, **overrides: float) -> torch.Tensor:
    """count samples of one distribution, one seed each."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | overrides
    return sample_tokens(
        logits.expand(count, -1),
        torch.full((count,), values["temperature"]),
        torch.full((count,), int(values["top_k"])),
        torch.full((count,), values["top_p"]),
        torch.full((count,), values["min_p"]),
        torch.arange(count) * 7919,
        torch.arange(count) % 13,
        truncates=True,
    )


@pytest.mark.parametrize(
    "overrides", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2, "temperature": 1.7}]
)
def test_draws_follow_the_distribution(overrides: dict[str, float]) -> None:
    """Chi-square over 12 tokens at 100,000 draws; the limit is the 99.99 % point."""
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    scaled = logits.double().numpy() / overrides.get("temperature", 1.0)
    kept = keep_by_hand(
        scaled, int(overrides.get("top_k", 0)), overrides.get("top_p", 1.0), overrides.get("min_p", 0)
    )
    weights = np.array([math.exp(scaled[i]) if i in kept else 0.0 for i in range(12)])
    expected = weights / weights.sum() * 100_000
    counts = np.bincount(draw(logits, 100_000, **overrides).numpy(), minlength=12)
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    chi_square = ((counts - expected)[live] ** 2 / expected[live]).sum()
    freedom = live.sum() - 1
    # Wilson-Hilferty: the 99.99 % point of chi-square.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square < limit


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
    together = sample_tokens(logits, *args, truncates=True)
    for row in range(32):
        alone = sample_tokens(logits[row : row + 1], *[a[row : row + 1] for a in args], truncates=True)
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
