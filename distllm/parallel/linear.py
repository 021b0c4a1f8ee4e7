"""Linear layers cut over tensor-parallel ranks: local weights plus the collective that completes the result.

Between them runs the residual stream: a column-parallel linear reads it through a norm, a row-parallel one
adds to it. Each class says which shard of `sharding.py` it is fed with. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeGuard, runtime_checkable

import torch

from distllm.comm.base import TensorComm
from distllm.kernels import activate, linear, linear_activate_mul, linear_add
from distllm.parallel.stream import Norm, RMSNorm, Stream


@dataclass(frozen=True)
class ColumnParallelLinear:
    """y = norm(x) Wᵀ + b with the output features cut (`column_shards`): it stays cut, nothing is sent."""

    weight: torch.Tensor  # [local_out, in]
    bias: torch.Tensor | None  # [local_out]
    norm: Norm

    def __call__(self, stream: Stream) -> torch.Tensor:
        """Returns [num_tokens, local_out]. No collective."""
        x, norm = stream.read(self.norm)
        return linear(x, self.weight, self.bias, norm=norm)


@dataclass(frozen=True)
class ActivatedColumnParallelLinear(ColumnParallelLinear):
    """activation(y)."""

    activation: str

    def __call__(self, stream: Stream) -> torch.Tensor:
        return activate(super().__call__(stream), self.activation)


@dataclass(frozen=True)
class GatedColumnParallelLinear(ColumnParallelLinear):
    """activation(gate) · up of a fused gate and up, each cut for itself."""

    activation: str

    def __call__(self, stream: Stream) -> torch.Tensor:
        """Returns [num_tokens, local_out / 2]. No collective."""
        x, norm = stream.read(self.norm)
        return linear_activate_mul(x, self.weight, self.bias, self.activation, norm=norm)


@dataclass(frozen=True)
class PartialSum:
    """The stream grows by Σ over ranks of what each has a part of, + b."""

    tp: TensorComm
    bias: torch.Tensor | None = None  # [out], whole on every rank
    post_norm: Norm | None = None  # of what is added

    def __call__(self, partial: torch.Tensor, stream: Stream, next_norm: Norm | None = None) -> Stream:
        """partial: [num_tokens, out]. stream.hidden is added to in place. next_norm: what reads the stream
        next.

        Collective: one sum of [num_tokens, out] by every rank of tp, in one kernel with the norm where tp
        can.
        """
        if self.post_norm is not None:
            return Stream(stream.hidden.add_(self.post_norm(self._sum(partial))))
        if self.bias is None and _is_fusible(next_norm, partial) and isinstance(self.tp, FusesNorm):
            fused = self.tp.try_all_reduce_add_norm(partial, stream.hidden, next_norm.gain, next_norm.eps)
            if fused is not None:
                normed, hidden = fused
                return Stream(hidden, normed)
        return Stream(stream.hidden.add_(self._sum(partial)))

    def _sum(self, partial: torch.Tensor) -> torch.Tensor:
        total = self.tp.all_reduce(partial)
        # After the sum: added before it, the bias would count once for each rank.
        return total if self.bias is None else total.add_(self.bias)


@dataclass(frozen=True)
class RowParallelLinear:
    """The stream grows by Σ over ranks of x Wᵀ, + b, with the input features cut (`row_shards`)."""

    weight: torch.Tensor  # [out, local_in]
    add: PartialSum

    def __call__(self, x: torch.Tensor, stream: Stream, next_norm: Norm | None = None) -> Stream:
        """x: [num_tokens, local_in]. The rest, and what is collective, as of PartialSum."""
        if self.add.tp.size == 1 and self.add.post_norm is None:
            return Stream(linear_add(x, self.weight, self.add.bias, stream.hidden))
        return self.add(linear(x, self.weight), stream, next_norm)


def _is_fusible(norm: Norm | None, x: torch.Tensor) -> TypeGuard[RMSNorm]:
    """A communicator's kernel norms as RMSNorm does, with a gain of x's dtype."""
    return isinstance(norm, RMSNorm) and norm.gain.dtype == x.dtype


@runtime_checkable
class FusesNorm(Protocol):
    """What a communicator may offer beyond TensorComm: the sum, the residual and the norm in one kernel."""

    def try_all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """add_rms_norm(all_reduce(x), residual, weight, eps), x left as it is; or None, on every rank."""
        ...
