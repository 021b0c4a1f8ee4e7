"""Kernels compiled side by side before steps are captured."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from distllm.kernels.triton.compile import compile_together, zero_filled


@triton.jit
def _fill_kernel(out, value, WIDTH: tl.constexpr):
    tl.store(out + tl.arange(0, WIDTH), value)


def test_what_nobody_wrote_is_zero() -> None:
    some = torch.full((1 << 12,), 7.0)
    makers = (
        lambda: torch.empty(1 << 12),
        lambda: torch.empty_like(some),
        lambda: some.new_empty(1 << 12),
        lambda: torch.empty(64, 64, dtype=torch.int64),
    )
    for make in makers:
        make().fill_(7.0)  # and freed: what comes next would likely have its memory
        with zero_filled(), torch.inference_mode():
            assert make().eq(0).all()


@pytest.mark.gpu
def test_launches_wait_for_their_kernels() -> None:
    compiled: list[str] = []
    knobs.runtime.jit_post_compile_hook = lambda **facts: compiled.append(facts["fn"].name)
    try:
        with compile_together():
            outs = [torch.empty(width, device="cuda") for width in (16, 32, 32)]
            for out in outs:
                _fill_kernel[(1,)](out, 3, len(out))
        assert compiled == ["_fill_kernel"] * 2
        assert all(out.eq(0).all() for out in outs)
        for out in outs:
            _fill_kernel[(1,)](out, 3, len(out))
            assert out.eq(3).all()
        assert len(compiled) == 2
    finally:
        knobs.runtime.jit_post_compile_hook = None
