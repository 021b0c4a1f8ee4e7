"""The reference operations against numpy in fp64, written out longhand, at random and odd sizes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from distllm.kernels import (
    activate,
    activate_mul,
    add_rms_norm,
    embed,
    layer_norm,
    paged_attention,
    rms_norm,
    rope_and_cache_kv,
)
from distllm.kernels.batch import TokenBatch

SIZES = [(1, 2), (3, 7), (17, 96), (0, 5)]


def fp64(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


def numpy_rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_rms_norm(rows: int, width: int) -> None:
    torch.manual_seed(width)
    x, weight = torch.randn(rows, width) * 3, torch.randn(width)
    wanted = numpy_rms_norm(fp64(x), fp64(weight), 0.01)
    np.testing.assert_allclose(rms_norm(x, weight, 0.01).numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_add_rms_norm(rows: int, width: int) -> None:
    torch.manual_seed(width)
    x, residual, weight = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    before = x.clone(), residual.clone()
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    np.testing.assert_allclose(total.numpy(), fp64(x) + fp64(residual), atol=1e-6)
    np.testing.assert_allclose(
        normed.numpy(), numpy_rms_norm(fp64(x) + fp64(residual), fp64(weight), 1e-5), atol=1e-5
    )
    assert torch.equal(before[0], x) and torch.equal(before[1], residual)


def test_rms_norm_of_bfloat16_averages_in_fp32() -> None:
    """A bf16 mean over 4096 entries would be wrong in the second digit."""
    x = torch.full((1, 4096), 3.0, dtype=torch.bfloat16)
    x[0, 0] = 300.0
    wanted = 3.0 / np.sqrt((4095 * 9 + 90000) / 4096)
    found = rms_norm(x, torch.ones(4096, dtype=torch.bfloat16), 1e-5)
    assert found.dtype == torch.bfloat16
    assert abs(float(found[0, 1]) - wanted) < 0.004 * wanted


def test_fp32_gains_of_a_bfloat16_norm_are_not_rounded() -> None:
    """1.001 is 1 in bf16: such gains belong to 1 + w, and count before the one rounding at the end."""
    x, gain = torch.randn(40, 64).bfloat16(), torch.full((64,), 1.001) + torch.rand(64) * 0.02
    wanted = numpy_rms_norm(fp64(x), fp64(gain), 1e-6)
    found = rms_norm(x, gain, 1e-6)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.from_numpy(wanted).float().bfloat16())


@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_layer_norm(rows: int, width: int) -> None:
    torch.manual_seed(width)
    x, weight, bias = torch.randn(rows, width) * 3 + 5, torch.randn(width), torch.randn(width)
    wide = fp64(x) - fp64(x).mean(-1, keepdims=True)
    wanted = numpy_rms_norm(wide, fp64(weight), 0.01) + fp64(bias)
    np.testing.assert_allclose(layer_norm(x, weight, bias, 0.01).numpy(), wanted, atol=1e-5)


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_activations(rows: int, width: int, name: str) -> None:
    torch.manual_seed(width)
    x = torch.randn(rows, 2 * width) * 4
    gate, up = fp64(x)[:, :width], fp64(x)[:, width:]
    np.testing.assert_allclose(activate(x, name).numpy(), ACTIVATIONS[name](fp64(x)), atol=1e-5)
    np.testing.assert_allclose(activate_mul(x, name).numpy(), ACTIVATIONS[name](gate) * up, atol=2e-5)


def test_embed_gives_zero_for_the_ids_of_other_ranks() -> None:
    weight = torch.randn(4, 3)
    found = embed(torch.tensor([0, 4, 7, 8, 11, 5]), weight, first_row=4)
    zero = torch.zeros(3)
    assert torch.equal(found, torch.stack([zero, weight[0], weight[3], zero, zero, weight[1]]))


def test_embed_ignores_what_is_stored_elsewhere() -> None:
    """Zero times a row would not do: the row may hold infinities."""
    assert torch.equal(embed(torch.tensor([9]), torch.full((2, 3), torch.inf), 0), torch.zeros(1, 3))


def one_row(positions: list[int], table: list[int], block_size: int) -> TokenBatch:
    at = torch.tensor(positions)
    block_table = torch.tensor([table], dtype=torch.int32)
    return TokenBatch(
        positions=at,
        slot_mapping=block_table[0, at // block_size].long() * block_size + at % block_size,
        cu_seqlens_q=torch.tensor([0, len(positions)], dtype=torch.int32),
        seq_lens=torch.tensor([positions[-1] + 1], dtype=torch.int32),
        block_table=block_table,
        num_decodes=0,
    )


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 2, 6, 10])
def test_rope_and_cache_kv(rotary_dim: int, interleaved: bool, normed: bool) -> None:
    """Against complex multiplication; KV lands where the table says, and nowhere else."""
    torch.manual_seed(rotary_dim)
    heads, kv_heads, dim, block_size = 6, 2, 10, 4
    batch = one_row([5, 6, 7, 8, 9], table=[3, 6, 1], block_size=block_size)
    angles = torch.rand(5, rotary_dim // 2) * 100
    qkv, gains = torch.randn(5, (heads + 2 * kv_heads) * dim), (torch.randn(dim), torch.randn(dim))
    cache = torch.full((2, 7, block_size, kv_heads, dim), -9.0)
    q = rope_and_cache_kv(
        qkv,
        torch.cat((angles.cos(), angles.sin()), -1),
        batch,
        cache,
        *(heads, kv_heads, dim),
        qk_norm=(*gains, 0.01) if normed else None,
        interleaved=interleaved,
    )

    x = fp64(qkv).reshape(5, -1, dim)
    turned = x.copy()
    if normed:
        turned[:, :heads] = numpy_rms_norm(x[:, :heads], fp64(gains[0]), 0.01)
        turned[:, heads : heads + kv_heads] = numpy_rms_norm(
            x[:, heads : heads + kv_heads], fp64(gains[1]), 0.01
        )
    for i in range(rotary_dim // 2):
        pair = [2 * i, 2 * i + 1] if interleaved else [i, i + rotary_dim // 2]
        number = turned[..., pair[0]] + 1j * turned[..., pair[1]]
        number *= np.exp(1j * fp64(angles)[:, i, None])
        turned[..., pair[0]], turned[..., pair[1]] = number.real, number.imag
    np.testing.assert_allclose(q.numpy(), turned[:, :heads], atol=1e-5)
    assert q.is_contiguous()  # attention kernels count on it
    written = {(6, 1): 0, (6, 2): 1, (6, 3): 2, (1, 0): 3, (1, 1): 4}
    for block in range(7):
        for offset in range(block_size):
            token = written.get((block, offset))
            key = np.full((kv_heads, dim), -9.0) if token is None else turned[token, heads : heads + kv_heads]
            value = np.full((kv_heads, dim), -9.0) if token is None else x[token, heads + kv_heads :]
            np.testing.assert_allclose(cache[0, block, offset].numpy(), key, atol=1e-5)
            np.testing.assert_allclose(cache[1, block, offset].numpy(), value, atol=1e-5)


def numpy_attention(
    q: np.ndarray,
    cache: np.ndarray,
    rows: list[tuple[int, int]],
    tables: np.ndarray,
    scale: float,
    window: int,
    softcap: float,
    slopes: np.ndarray,
) -> np.ndarray:
    """rows: (tokens of this step, context) each. One token and one head at a time."""
    out, token = np.zeros_like(q), 0
    _, _, block_size, kv_heads, _ = cache.shape
    for row, (num_tokens, seq_len) in enumerate(rows):
        places = [(tables[row][p // block_size], p % block_size) for p in range(seq_len)]
        for position in range(seq_len - num_tokens, seq_len):
            seen = [p for p in range(seq_len) if p <= position and (not window or p > position - window)]
            for head in range(q.shape[1]):
                kv_head = head // (q.shape[1] // kv_heads)
                keys = np.stack([cache[0, places[p][0], places[p][1], kv_head] for p in seen])
                values = np.stack([cache[1, places[p][0], places[p][1], kv_head] for p in seen])
                scores = keys @ q[token, head] * scale
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                scores += slopes[head] * (np.array(seen) - position)
                weights = np.exp(scores - scores.max())
                out[token, head] = weights / weights.sum() @ values
            token += 1
    return out.reshape(len(q), -1)


ROWS = {
    "decode": [(1, 1), (1, 9), (1, 17), (1, 4)],
    "one decode": [(1, 6)],
    "prefill": [(5, 5)],
    "chunk": [(3, 11)],
    "mixed": [(1, 7), (1, 12), (4, 4), (6, 13)],
    "decode last": [(6, 13), (1, 3)],
    "all kinds": [(1, 1), (2, 2), (1, 8), (8, 8), (1, 16)],
}


KNOBS: dict[str, tuple[int, float, bool]] = {  # window, softcap, alibi
    "plain": (0, 0.0, False),
    "window of one": (1, 0.0, False),
    "window": (5, 0.0, False),
    "wide window": (13, 0.0, False),
    "softcap": (0, 1.5, False),
    "alibi": (0, 0.0, True),
    "all": (6, 2.0, True),
}


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("kind", ROWS)
def test_paged_attention(kind: str, knobs: str, heads: int, kv_heads: int) -> None:
    torch.manual_seed(heads)
    rows, block_size, dim = ROWS[kind], 4, 6
    window, softcap, has_alibi = KNOBS[knobs]
    slopes = torch.rand(heads) if has_alibi else torch.zeros(heads)
    width = 6  # wider than any row needs
    tables = torch.randperm(len(rows) * width).view(len(rows), width).int()
    cache = torch.randn(2, len(rows) * width, block_size, kv_heads, dim) * 2
    counts = torch.tensor([count for count, _ in rows])
    q = torch.randn(int(counts.sum()), heads, dim) * 2
    wanted = numpy_attention(fp64(q), fp64(cache), rows, tables.numpy(), 0.37, window, softcap, fp64(slopes))
    leading = next((i for i, (count, _) in enumerate(rows) if count > 1), len(rows))
    for num_decodes in {0, leading // 2, leading}:  # every one of them is right
        batch = TokenBatch(
            positions=torch.cat([torch.arange(length - count, length) for count, length in rows]),
            slot_mapping=torch.empty(0, dtype=torch.int64),
            cu_seqlens_q=torch.cat((torch.zeros(1), counts.cumsum(0))).int(),
            seq_lens=torch.tensor([length for _, length in rows], dtype=torch.int32),
            block_table=tables,
            num_decodes=num_decodes,
        )
        found = paged_attention(
            q,
            cache,
            batch,
            0.37,
            window=window,
            softcap=softcap,
            alibi_slopes=slopes if has_alibi else None,
        )
        np.testing.assert_allclose(found.numpy(), wanted, atol=2e-5)
