"""Slopes of attention with linear biases."""

from __future__ import annotations

import torch


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """[num_heads] fp32: 2^(−8k/c), k = 1 … c, for the largest power of two c of heads; the other heads lie
    between these: 2^(−8(2k−1)/2c), k = 1 … num_heads − c.
    """
    power = 1 << (num_heads.bit_length() - 1)
    exponents = [8 * k / power for k in range(1, power + 1)]
    exponents += [4 * (2 * k - 1) / power for k in range(1, num_heads - power + 1)]
    return torch.tensor([2.0**-exponent for exponent in exponents])
