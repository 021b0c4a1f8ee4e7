"""Linear layers cut over tensor-parallel ranks: local weights plus the collective that completes the result.

Each class says which shard of `sharding.py` it is fed with. Knows no model: names and sizes come from the
caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from distllm.comm.base import TensorComm
from distllm.kernels import add_rms_norm


@dataclass(frozen=True)
class ColumnParallelLinear:
    """y = x Wᵀ + b with the output features cut (`column_shards`): the result stays cut, nothing is sent."""

    weight: torch.Tensor  # [local_out, in]
    bias: torch.Tensor | None = None  # [local_out]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, in], whole on every rank. Returns [num_tokens, local_out]. No collective."""
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class RowParallelLinear:
    """y = Σ over ranks of x Wᵀ, + b, with the input features cut (`row_shards`)."""

    weight: torch.Tensor  # [out, local_in]
    bias: torch.Tensor | None  # [out], whole on every rank
    tp: TensorComm

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, local_in]. Returns [num_tokens, out], the same bits on every rank.

        Collective: one all_reduce of [num_tokens, out] by every rank of tp.
        """
        return self._complete(F.linear(x, self.weight))

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(total) · norm_weight, total) with total = self(x) + residual: the same bits on all ranks.

        x: [num_tokens, local_in]; residual and both results: [num_tokens, out], whole; norm_weight: [out].
        Collective: one sum of [num_tokens, out] by every rank of tp, in one kernel with the rest where tp
        can.
        """
        partial = F.linear(x, self.weight)
        if self.bias is None and isinstance(self.tp, FusesNorm):
            fused = self.tp.try_all_reduce_add_norm(partial, residual, norm_weight, eps)
            if fused is not None:
                return fused
        return add_rms_norm(self._complete(partial), residual, norm_weight, eps)

    def _complete(self, partial: torch.Tensor) -> torch.Tensor:
        y = self.tp.all_reduce(partial)
        # After the sum: added before it, the bias would count once for each rank.
        return y if self.bias is None else y.add_(self.bias)


@runtime_checkable
class FusesNorm(Protocol):
    """What a communicator may offer beyond TensorComm: the sum, the residual and the norm in one kernel."""

    def try_all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """add_rms_norm(all_reduce(x), residual, weight, eps), x left as it is; or None, on every rank."""
        ...
