"""Norms: RMSNorm, alone and fused with the residual addition before it, and LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in x's dtype.

    The mean in fp32; rounded to the gain's dtype before the gain, so that an fp32 gain loses nothing.
    x: [num_tokens, hidden_size]; weight: [hidden_size].
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return ((wide * scale).to(weight.dtype) * weight).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual). x, residual: [num_tokens, hidden_size]."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """(x − mean) / sqrt(variance + eps) · weight + bias over the last dimension, in fp32, rounded once.

    x: [num_tokens, hidden_size]; weight, bias: [hidden_size].
    """
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)
