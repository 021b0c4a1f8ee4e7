"""The fused gate-up product against its reference in fp64. On a CPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distllm.kernels.triton import gated_linear as gated
from distllm.kernels.triton import linear as linears
from tests.kernels.device import DEVICE

SMALL = gated.Tiling(32, 16, 32, 4, 3)
DTYPES = (
    [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
)  # the interpreter has no bf16 dot


def case(tokens: int, num_out: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(tokens + num_out + width)
    x, weight = (
        torch.randn(tokens, width).to(DEVICE, dtype),
        torch.randn(2 * num_out, width).to(DEVICE, dtype),
    )
    gate, up = (x.double() @ weight.double().T / 8).chunk(2, dim=1)
    return x, weight / 8, F.silu(gate) * up


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "num_out", "width"), [(1, 8, 8), (31, 24, 40), (33, 16, 32), (100, 72, 96), (300, 40, 8)]
)
def test_any_shape(tokens: int, num_out: int, width: int, dtype: torch.dtype) -> None:
    x, weight, expected = case(tokens, num_out, width, dtype)
    tilings = [gated.MANY, gated.SOME] if DEVICE == "cuda" else [SMALL]
    for tiling in tilings:
        assert error(gated.gated_linear(x, weight, tiling), expected) < 1e-2, tiling


@pytest.mark.skipif(DEVICE == "cpu", reason="the shapes of a model take minutes in the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [65, 100, 128, 1024, 3801])
def test_the_shape_of_a_model(tokens: int, dtype: torch.dtype) -> None:
    x, weight, expected = case(tokens, 14336, 4096, dtype)
    fused = gated.try_gated_linear(x, weight)
    assert fused is not None and error(fused, expected) < 1e-2


@pytest.mark.parametrize(
    ("tokens", "num_out", "width", "dtype"),
    [(1024, 16, 16, torch.float32), (1024, 16, 12, torch.float16), (1024, 12, 16, torch.float16),
     (512, 8192, 8, torch.float16), (128, 4096, 8, torch.float16)],
)  # fmt: skip
def test_what_it_leaves_to_others_is_right_too(
    tokens: int, num_out: int, width: int, dtype: torch.dtype
) -> None:
    """Other dtypes, rows that are no whole 16 bytes, sizes where it would be slower."""
    x, weight, expected = case(tokens, num_out, width, dtype)
    assert gated.try_gated_linear(x, weight) is None
    if DEVICE == "cuda" or tokens * num_out < 2**18:
        assert error(linears.linear_activate_mul(x, weight, None, "silu"), expected) < 1e-2
