"""The numbers of a RopeSpec: rotary frequencies, and what cosines and sines are multiplied by."""

from __future__ import annotations

import math

import torch

from distllm.models.rope_spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    RopeSpec,
    YarnScaling,
)


def rope_frequencies(rope: RopeSpec | None, head_dim: int, max_model_len: int) -> torch.Tensor:
    """Radians per position of each pair that turns: [rotary_dim / 2] fp32, on the CPU; empty without rope.

    max_model_len: of the engine; dynamic and longrope are fixed by it.
    """
    if rope is None:
        return torch.empty(0)
    dim, scaling = rope.rotary_dim or head_dim, rope.scaling
    if isinstance(scaling, DynamicScaling):
        return _plain(_grown_theta(rope.theta, dim, scaling, max_model_len), dim)
    freqs = _plain(rope.theta, dim)
    if isinstance(scaling, LinearScaling):
        return freqs / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _llama3(freqs, scaling)
    if isinstance(scaling, YarnScaling):
        return _yarn(freqs, rope.theta, dim, scaling)
    if isinstance(scaling, LongScaling):
        is_long = max_model_len > scaling.original_max_position
        return freqs / torch.tensor(scaling.long if is_long else scaling.short)
    return freqs


def rope_multiplier(rope: RopeSpec | None) -> float:
    """Of cosines and sines."""
    scaling = rope.scaling if rope else None
    return scaling.attention_factor if isinstance(scaling, YarnScaling | LongScaling) else 1.0


def _plain(theta: float, dim: int) -> torch.Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return 1.0 / theta**exponents


def _grown_theta(theta: float, dim: int, scaling: DynamicScaling, max_model_len: int) -> float:
    longer = max(1.0, max_model_len / scaling.original_max_position)
    return float(theta * (scaling.factor * longer - (scaling.factor - 1)) ** (dim / (dim - 2)))


def _llama3(freqs: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Fast pairs stay, slow pairs are divided by the factor, those between are blended.

    A pair's turns within the original window decide: ≥ high_freq_factor is fast, ≤ low_freq_factor slow.
    """
    turns = scaling.original_max_position * freqs / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (keep + (1 - keep) / scaling.factor)


def _yarn(freqs: torch.Tensor, theta: float, dim: int, scaling: YarnScaling) -> torch.Tensor:
    """Pairs up to the one of beta_fast turns stay, those from the one of beta_slow on are divided."""
    low, high = (
        dim * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2) - low) / (high - low if high != low else 0.001)
    slow = ramp.clamp(0, 1)
    return freqs * (1 - slow) + freqs / scaling.factor * slow
