"""The grouped products of a mixture of experts against one expert after the other, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distllm.kernels.reference import experts as reference
from distllm.kernels.triton import experts as triton_experts
from tests.kernels.device import DOT_DTYPES, randn

SHAPES = [  # tokens, experts, top_k, width, inner
    (1, 4, 2, 16, 24),
    (5, 8, 8, 40, 17),
    (70, 3, 1, 33, 64),
    (130, 2, 2, 64, 130),
    (9, 64, 3, 24, 8),
]


def by_hand(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, shares: torch.Tensor, experts: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, (row, chosen) in enumerate(zip(shares.tolist(), experts.tolist(), strict=True)):
        for share, expert in zip(row, chosen, strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            out[token] += share * (down[expert].double() @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "width", "inner"), SHAPES)
@pytest.mark.parametrize("module", [reference, triton_experts], ids=["reference", "triton"])
def test_expert_mlp(
    module: object, tokens: int, num_experts: int, top_k: int, width: int, inner: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens)
    x = randn(tokens, width, dtype=dtype)
    gate_up, down = (
        randn(num_experts, 2 * inner, width, dtype=dtype),
        randn(num_experts, width, inner, dtype=dtype),
    )
    logits = randn(tokens, num_experts)
    logits[:, 0] -= 100  # nobody's expert, unless all are
    shares, experts = reference.route(logits, top_k, renormalize=False)
    wanted = by_hand(x, gate_up, down, shares, experts)
    got = module.expert_mlp(x, gate_up, down, shares, experts)  # type: ignore[attr-defined]
    limit = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    assert got.dtype == dtype and float((got.double() - wanted).norm() / wanted.norm()) < limit


@pytest.mark.parametrize("renormalize", [False, True])
def test_route(renormalize: bool) -> None:
    """Against a softmax over the chosen logits alone, which renormalising amounts to."""
    logits = randn(50, 9) * 3
    shares, experts = reference.route(logits, 4, renormalize=renormalize)
    assert experts.tolist() == logits.argsort(-1, descending=True)[:, :4].tolist()
    chosen = logits.double().gather(-1, experts)
    wanted = (
        chosen.softmax(-1) if renormalize else (chosen - logits.double().logsumexp(-1, keepdim=True)).exp()
    )
    torch.testing.assert_close(shares.double(), wanted, atol=1e-6, rtol=1e-6)
