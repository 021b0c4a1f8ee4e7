"""Linear layers cut over tensor-parallel ranks: local weights plus the collective that completes the result.

Between them runs the residual stream: a column-parallel linear reads it through a norm, a row-parallel one
adds to it. Each class says which shard of `sharding.py` it is fed with. Knows no model: names and sizes come
from the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from distllm.comm.base import TensorComm
from distllm.kernels import linear_add, norm_linear, norm_linear_silu_mul


@dataclass(frozen=True)
class ColumnParallelLinear:
    """y = norm(x) Wᵀ + b with the output features cut (`column_shards`): the result stays cut."""

    weight: torch.Tensor  # [local_out, in]
    bias: torch.Tensor | None  # [local_out]
    gain: torch.Tensor  # [in], of the RMSNorm before it
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, in], whole on every rank. Returns [num_tokens, local_out]. No collective."""
        return norm_linear(x, self.gain, self.eps, self.weight, self.bias)


class GatedColumnParallelLinear(ColumnParallelLinear):
    """silu(gate) · up of a fused gate and up, each cut for itself."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, in], whole on every rank. Returns [num_tokens, local_out / 2]. No collective."""
        return norm_linear_silu_mul(x, self.gain, self.eps, self.weight, self.bias)


@dataclass(frozen=True)
class RowParallelLinear:
    """y = residual + Σ over ranks of x Wᵀ, + b, with the input features cut (`row_shards`)."""

    weight: torch.Tensor  # [out, local_in]
    bias: torch.Tensor | None  # [out], whole on every rank
    tp: TensorComm

    def __call__(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, local_in]; residual: [num_tokens, out], added to in place and returned, the same
        bits on every rank.

        Collective: one all_reduce of [num_tokens, out] by every rank of tp.
        """
        if self.tp.size == 1:
            return linear_add(x, self.weight, self.bias, residual)
        residual.add_(self.tp.all_reduce(F.linear(x, self.weight)))
        # After the sum: added before it, the bias would count once for each rank.
        return residual if self.bias is None else residual.add_(self.bias)
