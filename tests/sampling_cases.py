"""What tests of the sampling operations share: rows that are hard, and their answers in NumPy's fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

Columns = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # temperature, top_k, top_p, min_p


def kept_by_hand(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
    """Which entries of one row min_p, then top_k, then top_p over what is left keep, by a sort."""
    weights = np.exp((logits - logits.max()) / temperature)
    kept = weights >= min_p
    if top_k > 0:
        kept &= logits >= np.sort(logits[kept])[::-1][:top_k][-1]
    if top_p < 1:
        order = np.argsort(-logits, kind="stable")
        order = order[kept[order]]
        before = np.concatenate([[0.0], np.cumsum(weights[order])[:-1]])
        kept &= logits >= logits[order[before < top_p * weights[order].sum()]].min()
    return kept


def typical_by_hand(logits: np.ndarray, mass: float, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Which entries of one row typical sampling keeps at least and at most, if masses are off by epsilon."""
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    live = probs > 0
    entropy = -(probs[live] * np.log(probs[live])).sum()
    with np.errstate(divide="ignore"):
        distance = np.abs(-np.log(probs) - entropy)
    order = np.argsort(distance, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(probs[order])[:-1]])

    strict, lax = (
        distance[order[before < share]].max() for share in (max(mass - epsilon, 1e-300), mass + epsilon)
    )
    return distance <= strict, distance <= lax


def hard_rows(
    vocab: int, dtype: torch.dtype, seed: int = 0, rows_of_a_kind: int = 6
) -> tuple[torch.Tensor, Columns]:
    """Rows with random values, ties, one value alone, a spike, −inf, wide and narrow ones, and their
    parameters. logits: [6 · rows_of_a_kind, vocab], in memory with longer rows.
    """
    rng = np.random.default_rng((seed, vocab))
    num_rows = 6 * rows_of_a_kind
    noise = rng.normal(0, 3, (6, rows_of_a_kind, vocab))
    noise[1] = np.round(noise[1])
    noise[2] = noise[2, :, :1]
    noise[3, :, rng.integers(vocab)] += 40
    noise[4][rng.random((rows_of_a_kind, vocab)) < 0.7] = -np.inf
    noise[4, :, rng.integers(vocab)] = 1.5
    noise[5] *= 10.0 ** rng.integers(-5, 4, (rows_of_a_kind, 1))
    logits = torch.full((num_rows, vocab + 7), torch.nan, dtype=dtype)[:, :vocab]
    logits.copy_(torch.from_numpy(noise.reshape(num_rows, vocab)))

    def column(values: list[float]) -> torch.Tensor:
        return torch.from_numpy(rng.choice(values, num_rows))

    temperature = column([0.0, 0.01, 0.3, 1, 1, 2, 10]).float()
    top_k = column([0, 0, 1, 2, 5, 50, vocab - 1, vocab, vocab + 9]).long()
    top_p = column([1e-6, 0.3, 0.9, 0.999, 0.999999, 1.0, 1.0]).float()
    min_p = column([0.0, 0.0, 0.01, 0.3, 1.0]).float()
    return logits, (temperature, top_k, top_p, min_p)


def check_kept(lowest: torch.Tensor, logits: torch.Tensor, columns: Columns, epsilon: float) -> None:
    """That logits ≥ lowest are what the parameters keep. Masses within epsilon of a border may fall either
    way: what is kept lies between the answers for slightly stricter and slightly laxer parameters.
    """
    rows = logits.double().cpu().numpy()
    num_decided = 0
    for row, border, heat, k, p, m in zip(
        rows, lowest.tolist(), *(column.tolist() for column in columns), strict=True
    ):
        if heat == 0 or (k == 0 and p == 1 and m == 0):
            assert border == -math.inf
            continue
        strict = kept_by_hand(row, heat, k, max(p - epsilon, 1e-300) if p < 1 else p, min(m + m * epsilon, 1))
        lax = kept_by_hand(row, heat, k, p + epsilon, m - m * epsilon)
        kept, finite = row >= border, np.isfinite(row)
        assert (kept | ~strict)[finite].all(), (heat, k, p, m)
        assert (lax | ~kept)[finite].all(), (heat, k, p, m)
        num_decided += (strict == lax).all()
    assert num_decided > len(rows) // 3  # or the check says little


def shards(logits: torch.Tensor, num_shards: int, *, pads: bool) -> Iterator[tuple[int, torch.Tensor]]:
    """(first entry, columns) of as many shards of the same length, the last ones padded with −inf, or short
    and perhaps empty.
    """
    vocab = logits.shape[1]
    length = -(-vocab // num_shards)
    for first in range(0, num_shards * length, length):
        shard = logits[:, first : first + length]
        missing = length - shard.shape[1]
        yield first, torch.nn.functional.pad(shard, (0, missing), value=-torch.inf) if pads else shard


def chi_square_passes(counts: np.ndarray, probs: np.ndarray) -> bool:
    """Whether counts may have come from probs, at the 99.99 % point; what has no mass must have no count."""
    expected = probs * counts.sum()
    live = expected > 0
    statistic = ((counts - expected)[live] ** 2 / expected[live]).sum()
    freedom = max(live.sum() - 1, 1)
    # Wilson-Hilferty: the 99.99 % point of chi-square.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    return bool(counts[~live].sum() == 0 and statistic < limit)
