"""Linear layers with what stands before or behind them: a norm, a gated activation, a residual addition.

One operation each, because on a GPU a single token's products run at the speed of memory, and every kernel
saved between them shows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distllm.kernels.reference.activation import activate_mul
from distllm.kernels.reference.norm import rms_norm


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """x Wᵀ + b, with x through rms_norm first where norm (gain [width], eps) is given.

    x: [num_tokens, width]; weight: [rows, width]; bias: [rows]. Returns [num_tokens, rows].
    """
    return F.linear(x if norm is None else rms_norm(x, *norm), weight, bias)


def linear_activate_mul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """activation(gate) · up of linear(), whose first half of rows is gate. Returns [num_tokens, rows / 2]."""
    return activate_mul(linear(x, weight, bias, norm=norm), activation)


def linear_add(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    """residual [num_tokens, rows], to which x Wᵀ + b is added in place."""
    return residual.add_(F.linear(x, weight, bias))
