"""How kernels follow each other on a stream: programmatic dependent launch, from Hopper on.

A kernel may then start while the one before it drains: every program of it must call `wait_for_inputs`
before it touches anything that the kernel before reads or writes. Launch it with `**OVERLAP`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def _has_overlap() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


HAS_OVERLAP = tl.constexpr(_has_overlap())
OVERLAP: dict[str, Any] = {"launch_pdl": True} if _has_overlap() else {}


@triton.jit
def wait_for_inputs():
    """Wait for every kernel before this one; the next may begin to start."""
    if HAS_OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
