"""Attention, rope and the KV cache in Triton against the references, with every knob, over ragged batches."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate
from typing import TypedDict

import pytest
import torch

from distllm.kernels.batch import TokenBatch
from distllm.kernels.reference import attention, rope
from distllm.kernels.triton import attention as triton_attention
from distllm.kernels.triton import decode_attention, prefill_attention
from distllm.kernels.triton import rope as triton_rope
from tests.kernels.device import DEVICE, DOT_DTYPES, DTYPES, close, randn


@dataclass(frozen=True)
class Rows:
    """Row i runs queries[i] tokens after contexts[i] cached ones."""

    contexts: list[int]
    queries: list[int]
    num_decodes: int = 0
    decode_len: int = 1


class Knobs(TypedDict, total=False):
    window: int
    softcap: float
    alibi_slopes: torch.Tensor


def make_batch(rows: Rows, block_size: int) -> tuple[TokenBatch, int]:
    """The batch over a shuffled pool of blocks, and how many these are."""
    lengths = [c + n for c, n in zip(rows.contexts, rows.queries, strict=True)]
    max_blocks = -(-max(lengths) // block_size) + 2
    table = torch.randperm(len(lengths) * max_blocks).int().view(len(lengths), max_blocks)
    counts = torch.tensor(rows.queries)
    owners = torch.arange(len(lengths)).repeat_interleave(counts)
    positions = torch.cat([torch.arange(c, n) for c, n in zip(rows.contexts, lengths, strict=True)])
    blocks = table[owners, positions // block_size].long()
    batch = TokenBatch(
        positions=positions.to(DEVICE),
        slot_mapping=(blocks * block_size + positions % block_size).to(DEVICE),
        cu_seqlens_q=torch.tensor([0, *accumulate(rows.queries)], dtype=torch.int32, device=DEVICE),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        block_table=table.to(DEVICE),
        num_decodes=rows.num_decodes,
        decode_len=rows.decode_len,
    )
    return batch, table.numel()


def make_knobs(heads: int, window: int = 0, softcap: float = 0.0, alibi: bool = False) -> Knobs:
    knobs = Knobs(window=window, softcap=softcap)
    if alibi:
        knobs["alibi_slopes"] = (torch.rand(heads) * 0.5).to(DEVICE)
    return knobs


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts of tests meet what long ones do: splits, both sizes of query tiles."""
    if DEVICE == "cpu":  # fewer programs, each of which the interpreter runs in turn
        monkeypatch.setattr(decode_attention, "PROGRAMS_WANTED", 12)
    monkeypatch.setattr(prefill_attention, "LONG_ROW", 100)


def check(
    rows: Rows, heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, knobs: Knobs
) -> None:
    torch.manual_seed(heads)
    batch, num_blocks = make_batch(rows, block_size)
    cache = randn(2, num_blocks, block_size, kv_heads, head_dim, dtype=dtype)
    q = randn(sum(rows.queries), heads, head_dim, dtype=dtype)
    scale = 1.2 * head_dim**-0.5
    want = attention.paged_attention(q.float(), cache.float(), batch, scale, **knobs)
    close(triton_attention.paged_attention(q, cache, batch, scale, **knobs), want, dtype)


@pytest.mark.parametrize("seed", range(12))
def test_random_verifications(seed: int) -> None:
    """The last row's tokens beyond decode_len are padding: nothing is asked of them."""
    rng = random.Random(seed)
    decode_len = rng.choice([2, 3, 5, 8, 9])
    queries = [rng.randint(1, decode_len) for _ in range(rng.choice([1, 2, 6]))]
    rows = Rows(
        [rng.choice([0, 1, 63, 64, 65, rng.randrange(200)]) for _ in queries],
        queries,
        len(queries),
        decode_len,
    )
    kv_heads, group, block_size = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 5]), rng.choice([1, 5, 16, 64])
    heads = kv_heads * group
    knobs = make_knobs(heads, rng.choice([0, 1, 2, 50, 128]), rng.choice([0.0, 3.0]), rng.random() < 0.5)
    check(rows, heads, kv_heads, rng.choice([8, 16, 40]), block_size, rng.choice(DOT_DTYPES), knobs)


ROWS = {
    "decode": Rows([0, 4, 99, 63], [1, 1, 1, 1], 4),
    "long decode": Rows([300], [1], 1),
    "verification": Rows([0, 4, 99, 63, 130], [3, 1, 5, 2, 4], 5, 5),
    "long verification": Rows([300], [6], 1, 7),
    "decodes not known to be": Rows([0, 4, 99, 63], [1, 1, 1, 1]),
    "prefill": Rows([0, 0], [150, 7]),
    "chunk": Rows([170], [29]),
    "mixed": Rows([10, 201, 0, 0, 130, 3], [1, 1, 40, 1, 1, 19], 2),
    "mixed, long row": Rows([10, 70], [1, 230], 1),
}
KNOBS = {
    "plain": {},
    "window of one": {"window": 1},
    "window": {"window": 17},
    "window of tiles": {"window": 64},
    "wide window": {"window": 90},
    "window beyond": {"window": 1000},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": True},
    "all": {"window": 33, "softcap": 2.0, "alibi": True},
}
SHAPES = [(8, 2, 32, 4), (4, 4, 16, 16), (7, 1, 80, 3), (6, 2, 64, 64), (3, 1, 40, 128), (2, 1, 10, 64)]


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "block_size"), SHAPES)
@pytest.mark.parametrize("rows", ["decode", "long decode", "verification", "mixed", "prefill"])
def test_shapes(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int, rows: str
) -> None:
    check(ROWS[rows], heads, kv_heads, head_dim, block_size, dtype, Knobs())


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("block_size", [4, 64])
def test_knobs(rows: str, knobs: str, block_size: int) -> None:
    check(ROWS[rows], 6, 2, 16, block_size, torch.float32, make_knobs(6, **KNOBS[knobs]))


@pytest.mark.parametrize("seed", range(12))
def test_random_layouts(seed: int) -> None:
    rng = random.Random(seed)
    num_decodes, num_others = rng.choice([(0, 3), (5, 0), (1, 1), (3, 4)])
    queries = [1] * num_decodes + [rng.choice([1, 1, 2, 15, 64, 110]) for _ in range(num_others)]
    rows = Rows([rng.choice([0, 1, 63, 64, 65, rng.randrange(200)]) for _ in queries], queries, num_decodes)
    kv_heads, group, block_size = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 5]), rng.choice([1, 5, 16, 64])
    heads = kv_heads * group
    knobs = make_knobs(heads, rng.choice([0, 2, 50, 128]), rng.choice([0.0, 3.0]), rng.random() < 0.5)
    check(rows, heads, kv_heads, rng.choice([8, 16, 40]), block_size, rng.choice(DOT_DTYPES), knobs)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(71, 1, 64), (7, 1, 96), (2, 1, 256), (48, 1, 128), (3, 3, 80), (9, 3, 64)],
)
@pytest.mark.parametrize("knobs", ["plain", "all"])
def test_groups_and_widths(heads: int, kv_heads: int, head_dim: int, knobs: str) -> None:
    rows = Rows([70, 40, 0], [1, 9, 1], 1)
    check(rows, heads, kv_heads, head_dim, 16, torch.float16, make_knobs(heads, **KNOBS[knobs]))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "heads", "kv_heads"), [(torch.float16, 7, 1), (torch.bfloat16, 8, 2)])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("knobs", ["plain", "all"])
def test_widths_on_tensor_cores(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, knobs: str
) -> None:
    for rows in ROWS.values():
        for block_size in (16, 64):
            check(rows, heads, kv_heads, head_dim, block_size, dtype, make_knobs(heads, **KNOBS[knobs]))


def attention_by_heads(
    q: torch.Tensor,
    cache: torch.Tensor,
    batch: TokenBatch,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """In fp32, one row, head and 64 queries at a time: what 100,000 positions leave memory for."""
    out, starts, group = torch.zeros_like(q), batch.cu_seqlens_q.tolist(), q.shape[1] // cache.shape[3]
    for row, seq_len in enumerate(batch.seq_lens.tolist()):
        blocks = batch.block_table[row, : -(-seq_len // cache.shape[2])].long()
        context = torch.arange(seq_len, device=q.device)
        for head in range(q.shape[1]):
            keys, values = (part[blocks, :, head // group].flatten(0, 1)[:seq_len].float() for part in cache)
            for first in range(starts[row], starts[row + 1], 64):
                some = slice(first, min(first + 64, starts[row + 1]))
                distance = batch.positions[some, None] - context
                scores = q[some, head].float() @ keys.T * scale
                if softcap:
                    scores = (scores / softcap).tanh() * softcap
                if alibi_slopes is not None:
                    scores -= alibi_slopes[head] * distance
                unseen = (distance < 0) | (distance >= (window or seq_len))
                out[some, head] = (scores.masked_fill(unseen, -torch.inf).softmax(-1) @ values).to(q.dtype)
    return out.flatten(1)


@pytest.mark.parametrize("knobs", ["plain", "alibi", "softcap", "wide window"])
@pytest.mark.parametrize("length", [300, pytest.param(100_000, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rows", ["one decode", "decodes", "chunk", "mixed"])
@pytest.mark.parametrize("block_size", [16, 64])
def test_long_contexts(length: int, rows: str, knobs: str, block_size: int) -> None:
    """Far positions count: alibi is so slight and scores so even that all are seen."""
    torch.manual_seed(0)
    layout = {
        "one decode": Rows([length - 1], [1], 1),
        "decodes": Rows([length - 1, length // 3, length // 2], [1, 1, 1], 3),
        "chunk": Rows([length], [512 if DEVICE == "cuda" else 40]),
        "mixed": Rows([length - 1, 7, length // 2], [1, 1, 70], 2),
    }[rows]
    heads, kv_heads, head_dim = (8, 2, 128) if DEVICE == "cuda" else (4, 2, 16)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    batch, num_blocks = make_batch(layout, block_size)
    cache = randn(2, num_blocks, block_size, kv_heads, head_dim, dtype=dtype)
    q = randn(sum(layout.queries), heads, head_dim, dtype=dtype)
    given = make_knobs(heads, **(KNOBS[knobs] | ({"window": length // 3} if "window" in knobs else {})))
    if "alibi_slopes" in given:
        given["alibi_slopes"] /= length
    want = attention_by_heads(q.float(), cache.float(), batch, 0.5 * head_dim**-0.5, **given)
    got = triton_attention.paged_attention(q, cache, batch, 0.5 * head_dim**-0.5, **given)
    size = float(want.abs().max())  # a mean over many values is small
    close(got / size, want / size, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"),
    [(4, 2, 16, 16), (3, 1, 80, 80), (5, 5, 64, 0), (12, 2, 128, 64), (7, 1, 80, 18), (4, 1, 256, 256)],
)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", ["no norm", "norm", "wide norm"])
def test_rope_and_cache(
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool,
    norm: str,
) -> None:
    torch.manual_seed(0)
    batch, num_blocks = make_batch(Rows([0, 5, 9], [3, 1, 4]), 4)
    qkv = randn(8, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    frequencies = randn(rotary_dim // 2)
    cos_sin = triton_rope.rope_cos_sin(frequencies, batch.positions, 1.2)
    close(cos_sin, rope.rope_cos_sin(frequencies, batch.positions, 1.2), torch.float32)
    caches = [torch.zeros(2, num_blocks, 4, kv_heads, head_dim, dtype=dtype, device=DEVICE) for _ in range(2)]
    gain_dtype = torch.float32 if norm == "wide norm" else dtype
    gains = randn(head_dim, dtype=gain_dtype), randn(head_dim, dtype=gain_dtype)
    args, qk_norm = (heads, kv_heads, head_dim), None if norm == "no norm" else (*gains, 1e-3)
    got = triton_rope.rope_and_cache_kv(
        qkv, cos_sin, batch, caches[0], *args, qk_norm=qk_norm, interleaved=interleaved
    )
    want = rope.rope_and_cache_kv(
        qkv, cos_sin, batch, caches[1], *args, qk_norm=qk_norm, interleaved=interleaved
    )
    close(got, want, dtype)
    close(caches[0], caches[1], dtype)
    if (
        not rotary_dim and dtype in DOT_DTYPES[1:]
    ):  # in 16 bits it shows whether both round at the same places
        assert (got == want).float().mean() > 0.99
