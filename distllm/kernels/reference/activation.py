"""What an MLP applies between its products, plain or as the gate of another half."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """The function of that name, in fp32 inside. x: [num_tokens, width]."""
    return FUNCTIONS[activation](x)


def activate_mul(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) · up. gate_up: [num_tokens, 2 · width], gate first; returns [num_tokens, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return FUNCTIONS[activation](gate) * up
