"""The sum of an all-reduce on the CPU, in one fixed order. Knows tensors, not how they travelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def sum_in_rank_order(parts: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """out = parts[0] + parts[1] + …, strictly from left to right, so that every rank gets the same bits.

    16-bit floats are summed in fp32 and rounded once. parts and out: same shape and dtype; out may be a part.
    """
    narrow = out.is_floating_point() and out.itemsize < 4
    total = parts[0].float() if narrow else parts[0].clone()
    for part in parts[1:]:
        total += part
    return out.copy_(total)
