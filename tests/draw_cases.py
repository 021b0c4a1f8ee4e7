"""Draws from a small vocabulary: what an engine is asked for, and whether what came follows the distribution.

The distribution of each draw is that of transformers' logits behind the same tokens, with controls and
truncation in NumPy's fp64.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distllm import SamplingParams
from tests import launchers
from tests.checkpoints import make_llama
from tests.sampling_cases import chi_square_passes

VOCAB_SIZE, PROMPT_LEN = 61, 4  # no tp divides the vocabulary
NUM_SEQUENCES, NUM_TOKENS = 2000, 50  # of each way; every token is a draw
NUM_BINS = 16  # few: 2 % of a temperature are seen
WAYS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "top-k, top-p": {"temperature": 1.2, "top_k": 20, "top_p": 0.9},
    "min-p": {"min_p": 0.05},
    # Below zero tokens come again, so that counts grow.
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.5},
}


def make_folder(folder: Path) -> Any:
    """A checkpoint in fp32; the model of transformers."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    return make_llama(folder, vocab_size=VOCAB_SIZE, num_hidden_layers=1, **heads)


def prompts() -> list[list[int]]:
    return np.random.default_rng(0).integers(3, VOCAB_SIZE, (NUM_SEQUENCES, PROMPT_LEN)).tolist()


def params(way: str) -> list[SamplingParams]:
    """Neighbouring seeds, as those of the n samples of a prompt are."""
    fields = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "detokenize": False} | WAYS[way]
    return [SamplingParams(seed=seed, **fields) for seed in range(NUM_SEQUENCES)]


def draws_file(folder: Path, tp: int) -> Path:
    """What run_draws.py writes: by way, [NUM_SEQUENCES, NUM_TOKENS] token ids."""
    return folder / f"draws-tp{tp}.npz"


def check_layouts(folder: Path, sizes: Sequence[int], device: str) -> None:
    """Draw at each tp and check every way. Seeds give the same tokens at all of them, but for a tie within
    rounding, after which a sequence goes its own way.
    """
    model = make_folder(folder)
    draws = {tp: draw(folder, tp, device) for tp in sizes}
    for way, (tp, found) in itertools.product(WAYS, draws.items()):
        check(model, way, found[way], f"{way}, tp {tp}")
        equal = (found[way] == draws[sizes[0]][way]).all(1).mean()
        assert equal > 0.99, f"{way}: {equal:.1%} of the sequences at tp {tp} are those of tp {sizes[0]}"


def draw(folder: Path, tp: int, device: str) -> Mapping[str, np.ndarray]:
    run = launchers.launcher("openmpi").run
    code, output = run(tp, "tests/mpi/run_draws.py", folder, tp, timeout_s=130)
    assert code == 0 and f"tp {tp} on {device} drew" in output, output
    with np.load(draws_file(folder, tp)) as found:
        return dict(found)


def check(model: Any, way: str, draws: np.ndarray, what: str) -> None:
    """Chi-square: where each draw lies in its own distribution is uniform."""
    assert draws.shape == (NUM_SEQUENCES, NUM_TOKENS)
    places = _places(_weights(_logits(model, draws), draws, **WAYS[way]), draws)
    counts, _ = np.histogram(places, NUM_BINS, (0, 1))
    assert chi_square_passes(counts, np.full(NUM_BINS, 1 / NUM_BINS)), f"{what}: {counts}"


@torch.no_grad()
def _logits(model: Any, draws: np.ndarray) -> np.ndarray:
    """Those that each draw was made from: [NUM_SEQUENCES, NUM_TOKENS, VOCAB_SIZE]."""
    token_ids = torch.from_numpy(np.concatenate([prompts(), draws], axis=1))
    pieces = [model(piece).logits[:, PROMPT_LEN - 1 : -1] for piece in token_ids.split(100)]
    return torch.cat(pieces).double().numpy()


def _weights(
    logits: np.ndarray,
    draws: np.ndarray,
    temperature: float = 1,
    top_k: int = VOCAB_SIZE,
    top_p: float = 1,
    min_p: float = 0,
    **penalties: float,
) -> np.ndarray:
    """Of every token, in proportion to how probable the parameters make it."""
    if penalties:
        logits = _penalised(logits, draws, **penalties)
    weights = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    ranked = -np.sort(-weights, axis=-1)
    kept = (ranked >= min_p) & (np.arange(VOCAB_SIZE) < top_k)
    sums = np.cumsum(ranked * kept, axis=-1)
    kept &= sums - ranked < top_p * sums[..., -1:]
    return weights * (weights >= np.where(kept, ranked, np.inf).min(-1, keepdims=True))


def _penalised(
    logits: np.ndarray,
    draws: np.ndarray,
    repetition_penalty: float,
    presence_penalty: float,
    frequency_penalty: float,
) -> np.ndarray:
    drawn = np.eye(VOCAB_SIZE)[draws]
    before = np.cumsum(drawn, axis=1) - drawn
    seen = np.eye(VOCAB_SIZE)[prompts()].sum(1)[:, None] + before > 0
    repeated = np.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
    return np.where(seen, repeated, logits) - frequency_penalty * before - presence_penalty * (before > 0)


def _places(weights: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Of each draw a point of the share that it has in 0 … 1, where likelier tokens come first: by a draw of
    our own, so that it is uniform. A token that cannot come has its place at 1.
    """
    order = np.argsort(-weights, axis=-1)
    ranked = np.take_along_axis(weights, order, -1)
    ends = np.cumsum(ranked, axis=-1) / ranked.sum(-1, keepdims=True)
    rank = (order == draws[..., None]).argmax(-1)[..., None]
    share = np.take_along_axis(ranked, rank, -1) / ranked.sum(-1, keepdims=True)
    inside = np.random.default_rng(1).random(share.shape)
    return np.minimum(np.take_along_axis(ends, rank, -1) - inside * share, 1)
