"""Measures what a device does at best: the ceilings that floors are computed from."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distllm.ops.bench.floors import Ceilings
from distllm.ops.bench.timing import time_calls

# Several times what caches hold; and a product as large as performance notes usually quote.
READ_BYTES = {"cuda": 2**30, "cpu": 2**27}
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
WIDTH = 4096


@torch.inference_mode()
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best sample of each: a ceiling is what the device can do, not what it does in the median."""
    return Ceilings(_read_bytes_per_s(device, dtype), _flop_per_s(device, dtype))


def _read_bytes_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """A sum or a product with a vector, whichever streams faster here."""
    rows = READ_BYTES[device.type] // (WIDTH * dtype.itemsize)
    stream = torch.ones(rows, WIDTH, dtype=dtype, device=device)
    vector = torch.ones(1, WIDTH, dtype=dtype, device=device)
    readers = (stream.sum, lambda: F.linear(vector, stream))
    return stream.nbytes / min(time_calls([reader], device).lowest for reader in readers)


def _flop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Random values: a GPU runs zeros faster, for they need less power."""
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / time_calls([lambda: a @ b], device).lowest
