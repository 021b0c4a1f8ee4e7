"""Linear layers cut over tensor-parallel ranks: local weights plus the collective that completes the result.

Between them runs the residual stream: a column-parallel linear reads it through a norm, a row-parallel one
adds to it. Each class says which shard of `sharding.py` it is fed with. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from distllm.comm.base import TensorComm
from distllm.kernels import linear, linear_add, linear_silu_mul


class Norm(NamedTuple):
    """An RMSNorm: its gain [hidden_size] and eps."""

    gain: torch.Tensor
    eps: float


class Stream(NamedTuple):
    """The residual stream, [num_tokens, hidden_size], the same bits on every rank of a stage."""

    hidden: torch.Tensor
    normed: torch.Tensor | None = None  # as the next norm makes it, where the reduction before did that too


@dataclass(frozen=True)
class ColumnParallelLinear:
    """y = norm(x) Wᵀ + b with the output features cut (`column_shards`): it stays cut, nothing is sent."""

    weight: torch.Tensor  # [local_out, in]
    bias: torch.Tensor | None  # [local_out]
    norm: Norm

    def __call__(self, stream: Stream) -> torch.Tensor:
        """Returns [num_tokens, local_out]. No collective."""
        if stream.normed is not None:
            return linear(stream.normed, self.weight, self.bias)
        return linear(stream.hidden, self.weight, self.bias, norm=self.norm)


class GatedColumnParallelLinear(ColumnParallelLinear):
    """silu(gate) · up of a fused gate and up, each cut for itself."""

    def __call__(self, stream: Stream) -> torch.Tensor:
        """Returns [num_tokens, local_out / 2]. No collective."""
        if stream.normed is not None:
            return linear_silu_mul(stream.normed, self.weight, self.bias)
        return linear_silu_mul(stream.hidden, self.weight, self.bias, norm=self.norm)


@dataclass(frozen=True)
class RowParallelLinear:
    """The stream grows by Σ over ranks of x Wᵀ, + b, with the input features cut (`row_shards`)."""

    weight: torch.Tensor  # [out, local_in]
    bias: torch.Tensor | None  # [out], whole on every rank
    tp: TensorComm

    def __call__(self, x: torch.Tensor, stream: Stream, next_norm: Norm | None = None) -> Stream:
        """x: [num_tokens, local_in]. stream.hidden is added to in place. next_norm: what reads the stream
        next.

        Collective: one sum of [num_tokens, out] by every rank of tp, in one kernel with the norm where tp
        can.
        """
        if self.tp.size == 1:
            return Stream(linear_add(x, self.weight, self.bias, stream.hidden))
        partial = linear(x, self.weight)
        if next_norm is not None and self.bias is None and isinstance(self.tp, FusesNorm):
            fused = self.tp.try_all_reduce_add_norm(partial, stream.hidden, *next_norm)
            if fused is not None:
                normed, hidden = fused
                return Stream(hidden, normed)
        hidden = stream.hidden.add_(self.tp.all_reduce(partial))
        # After the sum: added before it, the bias would count once for each rank.
        return Stream(hidden if self.bias is None else hidden.add_(self.bias))


@runtime_checkable
class FusesNorm(Protocol):
    """What a communicator may offer beyond TensorComm: the sum, the residual and the norm in one kernel."""

    def try_all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """add_rms_norm(all_reduce(x), residual, weight, eps), x left as it is; or None, on every rank."""
        ...
