"""Linear layers cut over tensor-parallel ranks: local weights plus the collective that completes the result.

Each class says which shard of `sharding.py` it is fed with. Knows no model: names and sizes come from the
caller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from distllm.comm.base import TensorComm


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
        y = self.tp.all_reduce(F.linear(x, self.weight))
        # After the sum: added before it, the bias would count once for each rank.
        return y if self.bias is None else y.add_(self.bias)
