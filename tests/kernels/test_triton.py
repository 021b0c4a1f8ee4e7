"""Every Triton kernel against its reference. On a machine without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import os
import random

import pytest
import torch

from distllm.kernels.batch import TokenBatch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

from distllm.kernels.reference import activation, attention, gather, norm, rope, sampling  # noqa: E402
from distllm.kernels.triton import activation as triton_activation  # noqa: E402
from distllm.kernels.triton import attention as triton_attention  # noqa: E402
from distllm.kernels.triton import decode_attention, prefill_attention  # noqa: E402
from distllm.kernels.triton import gather as triton_gather  # noqa: E402
from distllm.kernels.triton import linear as triton_linear  # noqa: E402
from distllm.kernels.triton import norm as triton_norm  # noqa: E402
from distllm.kernels.triton import rope as triton_rope  # noqa: E402
from distllm.kernels.triton import sampling as triton_sampling  # noqa: E402


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=tolerance, rtol=tolerance)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DOT_DTYPES = (
    DTYPES if DEVICE == "cuda" else DTYPES[:2]
)  # the interpreter multiplies the bits of bf16 matrices


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


def make_batch(
    rng: random.Random, block_size: int, contexts: list[int], queries: list[int]
) -> tuple[TokenBatch, int]:
    """Rows of queries[i] new tokens after contexts[i] cached ones, over a shuffled pool of blocks."""
    lengths = [c + n for c, n in zip(contexts, queries, strict=True)]
    max_blocks = -(-max(lengths) // block_size) + 2
    pool = list(range(len(lengths) * max_blocks))
    rng.shuffle(pool)
    table = torch.tensor(pool, dtype=torch.int32).view(len(lengths), max_blocks)
    positions = [p for c, n in zip(contexts, queries, strict=True) for p in range(c, c + n)]
    rows = [row for row, n in enumerate(queries) for _ in range(n)]
    places = [
        int(table[r, p // block_size]) * block_size + p % block_size
        for r, p in zip(rows, positions, strict=True)
    ]
    starts = [sum(queries[:i]) for i in range(len(queries) + 1)]
    batch = TokenBatch(
        positions=torch.tensor(positions, device=DEVICE),
        slot_mapping=torch.tensor(places, device=DEVICE),
        cu_seqlens_q=torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        block_table=table.to(DEVICE),
    )
    return batch, len(pool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 2, 16), (3, 1, 80), (5, 5, 64), (12, 2, 128)]
)
def test_rope_and_cache(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    batch, num_blocks = make_batch(random.Random(0), 4, [0, 5, 9], [3, 1, 4])
    qkv = randn(8, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    cos_sin = randn(8, head_dim)
    caches = [torch.zeros(2, num_blocks, 4, kv_heads, head_dim, dtype=dtype, device=DEVICE) for _ in range(2)]
    args = (heads, kv_heads, head_dim)
    got = triton_rope.rope_and_cache_kv(qkv, cos_sin, batch, caches[0], *args)
    want = rope.rope_and_cache_kv(qkv, cos_sin, batch, caches[1], *args)
    close(got, want, dtype)
    close(caches[0], caches[1], dtype)


SHAPES = [(8, 2, 32, 4), (4, 4, 16, 16), (7, 1, 80, 3), (6, 2, 64, 16)]


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size"), SHAPES)
@pytest.mark.parametrize(
    ("contexts", "queries"),
    [([0, 4, 99, 63], [1, 1, 1, 1]), ([300], [1]), ([0, 10, 0, 70, 3], [40, 1, 1, 5, 19]), ([0], [150])],
    ids=["decode", "long decode", "mixed", "prefill"],
)
def test_paged_attention(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    contexts: list[int],
    queries: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if DEVICE == "cpu":  # fewer programs, each of which the interpreter runs in turn
        monkeypatch.setattr(decode_attention, "PROGRAMS_WANTED", 4 * kv_heads * len(contexts))
    monkeypatch.setattr(prefill_attention, "LONG_ROW", 100)  # both sizes of tiles
    torch.manual_seed(0)
    batch, num_blocks = make_batch(random.Random(1), block_size, contexts, queries)
    cache = randn(2, num_blocks, block_size, kv_heads, head_dim, dtype=dtype)
    q = randn(sum(queries), heads, head_dim, dtype=dtype)
    want = attention.paged_attention(q.float(), cache.float(), batch, 0.3)
    close(triton_attention.paged_attention(q, cache, batch, 0.3), want, dtype)


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
        args = (num_computed, table, slots, starts, sum(counts), block_size)
        got, got_slots = triton_gather.gather_batch(*args)
        want, want_slots = gather.gather_batch(*args)
        for name in ("positions", "slot_mapping", "cu_seqlens_q", "seq_lens"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert torch.equal(got_slots, want_slots)
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
