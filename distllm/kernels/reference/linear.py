"""Linear layers with what stands before or behind them: a norm, a gated activation, a residual addition.

One operation each, because on a GPU a single token's products run at the speed of memory, and every kernel saved
between them shows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distllm.kernels.reference.activation import silu_mul
from distllm.kernels.reference.norm import rms_norm


def norm_linear(
    x: torch.Tensor, gain: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """rms_norm(x) Wᵀ + b. x: [num_tokens, width]; gain: [width]; weight: [rows, width]; bias: [rows]."""
    return F.linear(rms_norm(x, gain, eps), weight, bias)


def norm_linear_silu_mul(
    x: torch.Tensor, gain: torch.Tensor, eps: float, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """silu(gate) · up of norm_linear, whose first half of rows is gate. Returns [num_tokens, rows / 2]."""
    return silu_mul(norm_linear(x, gain, eps, weight, bias))


def linear_add(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    """residual + x Wᵀ + b. residual: [num_tokens, rows], added to in place, and returned."""
    return residual.add_(F.linear(x, weight, bias))
