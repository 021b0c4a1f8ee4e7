"""Rotary frequencies of a RopeSpec."""

from __future__ import annotations

import math

import torch

from distllm.models.spec import RopeScaling, RopeSpec


def rope_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair: [head_dim / 2] fp32, on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    freqs = 1.0 / rope.theta**exponents
    if rope.scaling is None:
        return freqs
    if rope.scaling.kind == "linear":
        return freqs / rope.scaling.factor
    return _llama3(freqs, rope.scaling)


def _llama3(freqs: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Fast pairs stay, slow pairs are divided by the factor, those between are blended.

    A pair's turns within the original window decide: ≥ high_freq_factor is fast, ≤ low_freq_factor slow.
    """
    turns = scaling.original_max_position * freqs / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (keep + (1 - keep) / scaling.factor)
