"""The residual stream and the norms through which it is read. Knows no communicator and no model."""

from __future__ import annotations

from typing import NamedTuple

import torch

from distllm.kernels import layer_norm, rms_norm


class RMSNorm(NamedTuple):
    """gain: [hidden_size]; in fp32 where it is 1 + the stored weight, which a narrower dtype would round."""

    gain: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.gain, self.eps)


class LayerNorm(NamedTuple):
    """gain, bias: [hidden_size]."""

    gain: torch.Tensor
    bias: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.gain, self.bias, self.eps)


Norm = RMSNorm | LayerNorm


class Stream(NamedTuple):
    """The residual stream, [num_tokens, hidden_size], the same bits on every rank of a stage."""

    hidden: torch.Tensor
    normed: torch.Tensor | None = None  # as the next norm makes it, where it is known already

    def read(self, norm: Norm) -> tuple[torch.Tensor, RMSNorm | None]:
        """What a linear behind this norm takes: its input, and the norm that it has still to apply."""
        if self.normed is not None:
            return self.normed, None
        if isinstance(norm, RMSNorm):
            return self.hidden, norm
        return norm(self.hidden), None

    def through(self, norm: Norm) -> Stream:
        """With its normed form, for several readers."""
        return self if self.normed is not None else Stream(self.hidden, norm(self.hidden))
