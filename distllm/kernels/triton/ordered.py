"""Numbers as integers in the same order, for bisections and for choosing the best of many."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered(bits, SHIFT: tl.constexpr):
    """Signed keys in the order of the fp32 numbers with these bits (>> SHIFT); its own inverse."""
    return bits ^ ((bits >> 31) & (0x7FFFFFFF >> SHIFT))
