"""Stored tensors as bytes: dtype names, and the checksum that engine.json keeps."""

from __future__ import annotations

import zlib

import torch

from distllm.models.spec import DType


def torch_dtype(name: DType) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def checksum(content: torch.Tensor) -> str:
    """CRC-32 of a contiguous CPU tensor's bytes, hexadecimal. Against damage, not against forgery: nothing
    in an engine is signed, and a cryptographic hash would read slower than the disk.
    """
    return f"{zlib.crc32(tensor_bytes(content)):08x}"
