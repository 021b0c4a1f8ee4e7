"""RMSNorm, alone and fused with the residual addition before it."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension; the mean in fp32, the gain in x's dtype.

    x: [num_tokens, hidden_size]; weight: [hidden_size].
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual). x, residual: [num_tokens, hidden_size]."""
    total = x + residual
    return rms_norm(total, weight, eps), total
