"""The Triton kernels around attention against their references; test_attention has the rest."""

from __future__ import annotations

import random

import pytest
import torch

from distllm.kernels.reference import activation, gather, norm, sampling
from distllm.kernels.triton import activation as triton_activation
from distllm.kernels.triton import gather as triton_gather
from distllm.kernels.triton import linear as triton_linear
from distllm.kernels.triton import norm as triton_norm
from distllm.kernels.triton import sampling as triton_sampling
from tests.kernels.device import DEVICE, DTYPES, close, randn


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (3, 100), (7, 4096), (2, 5)])
def test_norm(dtype: torch.dtype, tokens: int, width: int) -> None:
    x, residual, weight = (
        randn(tokens, width, dtype=dtype),
        randn(tokens, width, dtype=dtype),
        randn(width, dtype=dtype),
    )
    close(triton_norm.rms_norm(x, weight, 1e-5), norm.rms_norm(x, weight, 1e-5), dtype)
    got, want = (
        triton_norm.add_rms_norm(x, residual, weight, 1e-5),
        norm.add_rms_norm(x, residual, weight, 1e-5),
    )
    close(got[0], want[0], dtype)
    close(got[1], want[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (5, 100), (2, 3000)])
def test_silu_mul(dtype: torch.dtype, tokens: int, width: int) -> None:
    gate_up = randn(tokens, 2 * width, dtype=dtype)
    close(triton_activation.silu_mul(gate_up), activation.silu_mul(gate_up), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(6, 64), (7, 100), (3, 5000)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_gemv(dtype: torch.dtype, rows: int, width: int, normed: bool, gated: bool) -> None:
    x, gain, residual = randn(1, width, dtype=dtype), randn(width, dtype=dtype), randn(1, rows, dtype=dtype)
    weight = randn(rows * (2 if gated else 1), width, dtype=dtype) * 0.1
    bias = randn(weight.shape[0], dtype=dtype)
    wide = norm.rms_norm(x.float(), gain.float(), 1e-5) if normed else x.float()
    want = wide @ weight.float().T + bias.float()
    want = (activation.silu_mul(want) if gated else want) + residual.float()
    got = triton_linear.gemv(
        x, weight, bias, norm=(gain, 1e-5) if normed else None, gated=gated, residual=residual.clone()
    )
    scale = float(want.abs().max())
    close(got / scale, want / scale, dtype)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_gather(block_size: int) -> None:
    rng = random.Random(block_size)
    for _ in range(5):
        counts = [rng.choice([1, 1, 3, 300]) for _ in range(rng.randint(1, 6))]
        num_slots, width = 9, 320 // block_size + 40
        num_computed = torch.tensor([rng.randrange(20) for _ in range(num_slots)], device=DEVICE)
        table = torch.randperm(num_slots * width).int().view(num_slots, width).to(DEVICE)
        slots = torch.tensor(rng.sample(range(num_slots), len(counts)), device=DEVICE)
        starts = torch.tensor(
            [sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32, device=DEVICE
        )
        args = (num_computed, table, slots, starts, sum(counts), block_size, 1)
        got, got_slots = triton_gather.gather_batch(*args)
        want, want_slots = gather.gather_batch(*args)
        for name in ("positions", "slot_mapping", "cu_seqlens_q", "seq_lens"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert torch.equal(got_slots, want_slots)
        assert got.num_decodes == want.num_decodes == 1
        for row, length in enumerate(want.seq_lens.tolist()):
            used = -(-length // block_size)
            assert torch.equal(got.block_table[row, :used], want.block_table[row, :used])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [5, 4096, 9001])
@pytest.mark.parametrize("truncates", [False, True])
def test_sample_tokens(dtype: torch.dtype, vocab: int, truncates: bool) -> None:
    rows = 24
    logits = (randn(rows, vocab) * 3).to(dtype)
    temperature = torch.rand(rows, device=DEVICE) * torch.tensor([0.0, 1.0, 2.0] * 8, device=DEVICE)
    top_k = torch.randint(0, 6, (rows,), device=DEVICE)
    top_p, min_p = torch.rand(rows, device=DEVICE) * 0.5 + 0.5, torch.rand(rows, device=DEVICE) * 0.1
    seed = torch.randint(-(2**62), 2**62, (rows,), device=DEVICE)
    positions = torch.randint(0, 5000, (rows,), device=DEVICE)
    args = (temperature, top_k, top_p, min_p, seed, positions)
    got = triton_sampling.sample_tokens(logits, *args, truncates=truncates)
    want = sampling.sample_tokens(logits.float(), *args, truncates=truncates)
    assert torch.equal(got, want)


def test_largest_noise_is_finite() -> None:
    """Seed 55 draws the largest uniform for entry 644: 17.33 of noise, less than a logit of 30."""
    logits = torch.zeros(1, 4096, device=DEVICE)
    logits[0, 7] = 30.0
    one, none = torch.ones(1, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    args = (one, none, one, one * 0, none + 55, none)
    assert triton_sampling.sample_tokens(logits, *args, truncates=False).item() == 7
    logits[0, 7] = 0.0
    assert triton_sampling.sample_tokens(logits, *args, truncates=False).item() == 644
