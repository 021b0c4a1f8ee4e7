"""Tensors as bytes: dtype names, and the bytes of a tensor."""

from __future__ import annotations

import torch

from distllm.models.spec import DType


def torch_dtype(name: DType) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
