"""The Triton kernels around attention against their references; test_attention has the rest."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from distllm.kernels.reference import activation, gather, norm, sampling
from distllm.kernels.reference import linear as linears
from distllm.kernels.reference import penalties as penalties_by_torch
from distllm.kernels.reference import truncation as truncation_by_torch
from distllm.kernels.triton import activation as triton_activation
from distllm.kernels.triton import gather as triton_gather
from distllm.kernels.triton import linear as triton_linear
from distllm.kernels.triton import logprobs as triton_logprobs
from distllm.kernels.triton import masks as triton_masks
from distllm.kernels.triton import norm as triton_norm
from distllm.kernels.triton import penalties as triton_penalties
from distllm.kernels.triton import sampling as triton_sampling
from distllm.kernels.triton import truncation, typical
from tests.kernels.device import DEVICE, DTYPES, close, randn
from tests.sampling_cases import (
    check_kept,
    chi_square_passes,
    hard_rows,
    kept_by_hand,
    shards,
    typical_by_hand,
)


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


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_norm_keeps_gains_in_fp32(dtype: torch.dtype) -> None:
    x, weight = randn(7, 100, dtype=dtype), randn(100)
    found = triton_norm.rms_norm(x, weight, 1e-5)
    close(found, norm.rms_norm(x, weight, 1e-5), dtype)
    exact = norm.rms_norm(x.float(), weight, 1e-5)
    narrow = triton_norm.rms_norm(x, weight.to(dtype), 1e-5)
    assert (found - exact).abs().mean() < 0.8 * (narrow - exact).abs().mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (3, 100), (7, 4096), (2, 5)])
def test_layer_norm(dtype: torch.dtype, tokens: int, width: int) -> None:
    x, weight, bias = randn(tokens, width) + 3, randn(width, dtype=dtype), randn(width, dtype=dtype)
    args = (x.to(dtype), weight, bias, 1e-5)
    close(triton_norm.layer_norm(*args), norm.layer_norm(*args), dtype)


@pytest.mark.parametrize("name", activation.FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (5, 100), (2, 3000)])
def test_activations(dtype: torch.dtype, tokens: int, width: int, name: str) -> None:
    x = randn(tokens, 2 * width, dtype=dtype) * 2
    close(triton_activation.activate(x, name), activation.activate(x, name), dtype)
    close(triton_activation.activate_mul(x, name), activation.activate_mul(x, name), dtype)


@pytest.mark.parametrize("name", activation.FUNCTIONS)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_linear_activate_mul(tokens: int, has_norm: bool, name: str) -> None:
    """One token takes SiLU's own kernel, and no other activation may."""
    x, weight, bias = randn(tokens, 40), randn(14, 40) * 0.3, randn(14)
    args = (x, weight, bias, name)
    gain = (randn(40), 1e-5) if has_norm else None
    close(
        triton_linear.linear_activate_mul(*args, norm=gain),
        linears.linear_activate_mul(*args, norm=gain),
        torch.float32,
    )


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
    want = (activation.activate_mul(want, "silu") if gated else want) + residual.float()
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


def draw_columns(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """temperature, a third of them 0, seed and positions."""
    temperature = torch.rand(rows) * torch.tensor([0.0, 1.0, 2.0]).repeat(rows // 3)
    seed, positions = torch.randint(-(2**62), 2**62, (rows,)), torch.randint(0, 5000, (rows,))
    return temperature.to(DEVICE), seed.to(DEVICE), positions.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 4097])
@pytest.mark.parametrize("truncated", [False, True])
def test_best_tokens(
    dtype: torch.dtype, vocab: int, truncated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 6
    monkeypatch.setattr(triton_sampling, "PROGRAMS_WANTED", 3 * rows)  # two blocks a piece
    logits = (randn(rows, vocab) * 3).to(dtype)
    logits[::2] = logits[::2].round()  # ties
    logits[5] = -torch.inf
    lowest = None
    if truncated:
        lowest = logits.float().topk(min(vocab, 4)).values[:, -1].contiguous()
        lowest[::4] = -torch.inf
    args = (logits, *draw_columns(rows), lowest)
    scores, token_ids = triton_sampling.best_tokens(*args, first_entry=70_000)
    want_scores, want = sampling.best_tokens(*args, first_entry=70_000)
    assert torch.equal(token_ids, want)
    torch.testing.assert_close(scores, want_scores, atol=1e-5, rtol=1e-5)
    assert torch.equal(triton_sampling.sample_tokens(*args), sampling.sample_tokens(*args))


@pytest.mark.parametrize(("vocab", "num_shards"), [(5, 4), (3000, 2), (2500, 7)])
def test_shards_choose_what_the_whole_chooses(vocab: int, num_shards: int) -> None:
    logits = (randn(3, vocab) * 3).to(torch.bfloat16)
    logits[2] = -torch.inf
    columns = draw_columns(3)
    for lowest in (None, logits.float().topk(min(vocab, 50)).values[:, -1].contiguous()):
        want_scores, want = triton_sampling.best_tokens(logits, *columns, lowest)
        parts = [
            triton_sampling.best_tokens(shard, *columns, lowest, first_entry=first)
            for first, shard in shards(logits, num_shards, pads=lowest is None)
        ]
        scores, token_ids = (torch.stack(part) for part in zip(*parts, strict=True))
        assert torch.equal(triton_sampling.choose_best(scores, token_ids), want)
        assert torch.equal(scores.amax(0), want_scores)


def test_largest_noise_is_finite() -> None:
    """Seed 55 draws the largest uniform for entry 644: 17.33 of noise, less than a logit of 30."""
    logits = torch.zeros(1, 4096, device=DEVICE)
    logits[0, 7] = 30.0
    one, none = torch.ones(1, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    args = (one, none + 55, none)
    assert triton_sampling.sample_tokens(logits, *args).item() == 7
    logits[0, 7] = 0.0
    assert triton_sampling.sample_tokens(logits, *args).item() == 644


def test_smallest_noise_is_finite() -> None:
    """Seed 19897 draws the smallest uniform for entry 2160, which wins all the same if it is all that is
    kept. Its noise is −2.85, or −2.81 in fp32, where no number lies between 1 − 2⁻²⁴ and 1.
    """
    logits = torch.zeros(1, 4096, device=DEVICE)
    logits[0, 2160] = 1.0
    one, none = torch.ones(1, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    score, token_id = triton_sampling.best_tokens(logits, one, none + 19897, none, one)
    assert token_id.item() == 2160
    assert score.item() == pytest.approx(1.0 - np.log(np.log(2**25)), abs=0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [2, 1031, 5001])
def test_lowest_kept(dtype: torch.dtype, vocab: int) -> None:
    logits, columns = hard_rows(vocab, dtype, rows_of_a_kind=3)
    # Rows of a longer memory, and one more that is −inf alone.
    wide = torch.nn.functional.pad(logits, (0, 7, 0, 1), value=torch.nan).to(DEVICE)[:, :vocab]
    wide[-1] = -torch.inf
    last = (1.0, 1, 0.5, 0.3)
    on_device = [
        torch.cat([column, torch.tensor([value])]).to(DEVICE)
        for column, value in zip(columns, last, strict=True)
    ]
    lowest = truncation.lowest_kept(wide, *on_device)
    assert lowest[-1].item() == -torch.inf
    check_kept(lowest[:-1].cpu(), logits, columns, epsilon=1e-5)
    few = slice(4, 7)
    alone = truncation.lowest_kept(wide[few], *(column[few] for column in on_device))
    assert torch.equal(alone, lowest[few])  # a row does not see its batch


def test_top_k_above_a_min_p_between_two_values() -> None:
    """bf16 has 1.0 and 1.0078: min_p ends between them, and a top_k that is not reached adds neither."""
    logits = torch.tensor([[4.0, 1.0, 0.0], [-1.0, -4.0, -5.0]], dtype=torch.bfloat16, device=DEVICE)
    one = torch.ones(2, device=DEVICE)
    lowest = truncation.lowest_kept(logits, one, one.long() * 2, one, one * np.exp(-2.997))
    assert (logits >= lowest[:, None]).tolist() == [[True, False, False]] * 2


def test_truncated_draws_follow_the_distribution() -> None:
    """Chi-square over 40 tokens, at as many positions as the interpreter has time for."""
    count = 50_000 if DEVICE == "cuda" else 200
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    wide = logits.double().numpy()
    weights = np.exp(wide / 0.9) * kept_by_hand(wide, 0.9, 9, 0.9, 0.01)
    rows, one = logits.to(DEVICE).expand(count, -1), torch.ones(count, device=DEVICE)
    heat, top_k, top_p, min_p = one * 0.9, one.long() * 9, one * 0.9, one * 0.01
    lowest = truncation.lowest_kept(rows[:1], heat, top_k, top_p, min_p)
    positions = torch.arange(count, device=DEVICE)
    ids = triton_sampling.sample_tokens(rows, heat, top_k, positions, lowest.repeat(count))
    assert chi_square_passes(np.bincount(ids.cpu().numpy(), minlength=40), weights / weights.sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocab", "num_top"), [(1, 1, 1), (5, 17, 0), (5, 17, 11), (3, 9001, 20)])
@pytest.mark.parametrize("most_top", [64, 4])
def test_token_logprobs(
    dtype: torch.dtype, rows: int, vocab: int, num_top: int, most_top: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_logprobs, "MOST_TOP", most_top)
    logits = (randn(rows, vocab + 3) * 3).to(dtype)[:, :vocab]
    logits[:, : vocab // 3] = -torch.inf
    token_ids = torch.randint(vocab // 3, vocab, (rows,), device=DEVICE)
    logprob, rank, top_ids, top = triton_logprobs.token_logprobs(logits, token_ids, num_top)
    want = logits.double().log_softmax(-1)
    chosen = want.gather(-1, token_ids[:, None])
    torch.testing.assert_close(logprob, chosen[:, 0].float(), atol=4e-6, rtol=0)
    assert torch.equal(rank, (want > chosen).sum(-1) + 1)
    torch.testing.assert_close(top, want.topk(num_top).values.float(), atol=4e-6, rtol=0)
    torch.testing.assert_close(want.gather(-1, top_ids).float(), top, atol=4e-6, rtol=0)
    assert all(len(set(row)) == num_top for row in top_ids.tolist())


def test_of_equal_logits_the_first_are_best() -> None:
    """Across pieces, and where less than num_top of a row has a probability."""
    logits = torch.full((2, 5000), -torch.inf)
    logits[0, [4700, 3, 1025, 1023, 2000]] = torch.tensor([2.0, 0.0, 1.0, 1.0, 1.0])
    logits[1, [4999, 2]] = -7.5
    token_ids = torch.tensor([2000, 0]).to(DEVICE)
    logprob, rank, top_ids, top = triton_logprobs.token_logprobs(logits.to(DEVICE), token_ids, 6)
    assert top_ids.tolist() == [[4700, 1023, 1025, 2000, 3, 0], [2, 4999, 0, 1, 3, 4]]
    assert rank.tolist() == [2, 3] and logprob[1].item() == -torch.inf
    np.testing.assert_allclose(top[1, :2].cpu(), np.log([0.5, 0.5]), rtol=1e-6)


@pytest.mark.parametrize(("vocab", "max_len"), [(7, 5), (1031, 2500)])
def test_penalize(vocab: int, max_len: int) -> None:
    """Some rows of a batch in shuffled slots, of which some have no output yet; tokens come many times."""
    rng = np.random.default_rng(vocab)
    num_rows, batch, num_slots = 4, 6, 9
    table = torch.from_numpy(rng.integers(0, vocab, (num_slots, max_len), dtype=np.int32)).to(DEVICE)
    table[:, ::2] = vocab // 2
    slots, rows = (torch.from_numpy(rng.permutation(n)[:num_rows]).to(DEVICE) for n in (num_slots, batch))
    lengths = torch.from_numpy(rng.integers(1, max_len + 1, num_rows)).to(DEVICE)
    num_prompt = (lengths - torch.tensor([0, 1, max_len // 2, max_len]).to(DEVICE)).clamp(min=0)
    penalties = torch.from_numpy(rng.uniform(0.5, 2, (3, num_rows)).astype(np.float32)).to(DEVICE)
    logits = randn(batch, vocab)
    logits[:, 1] = -torch.inf
    found, wanted = logits.clone(), logits.clone()
    args = (rows, table, slots, lengths, num_prompt, penalties)
    triton_penalties.penalize(found, *args)
    penalties_by_torch.penalize(wanted, *args)
    assert not torch.equal(found, logits)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [2, 1031, 5001])
def test_keep_typical(dtype: torch.dtype, vocab: int) -> None:
    logits, (heat, top_k, _, min_p) = hard_rows(vocab, dtype, rows_of_a_kind=3)
    one, rows = torch.ones_like(heat), len(logits)
    p = torch.tensor([0.05, 0.3, 0.9, 0.999, 1e-30, 1.0]).repeat(rows // 6)[torch.randperm(rows)]
    lowest = truncation_by_torch.lowest_kept(logits, heat, top_k, one, min_p)
    found = typical.keep_typical(logits.to(DEVICE), heat.to(DEVICE), lowest.to(DEVICE), p.to(DEVICE)).cpu()
    assert found.dtype == dtype
    num_decided = 0
    for row, kept in enumerate(torch.isfinite(found).numpy()):
        assert torch.equal(found[row, kept], logits[row, kept])
        if heat[row] == 0 or p[row] == 1:
            assert torch.equal(found[row], logits[row])
            continue
        wide = logits[row].double().numpy()
        tempered = np.where(wide >= lowest[row].item(), wide, -np.inf) / heat[row].item()
        strict, lax = typical_by_hand(tempered, p[row].item(), 1e-5)
        assert (kept | ~strict).all() and (lax | ~kept).all(), (heat[row], p[row])
        num_decided += (strict == lax).all()
    assert num_decided > rows // 3
    every = typical.keep_typical(logits.to(DEVICE), heat.to(DEVICE), None, p.to(DEVICE))
    alone = typical.keep_typical(logits[4:7].to(DEVICE), heat[4:7].to(DEVICE), None, p[4:7].to(DEVICE))
    assert torch.equal(alone, every[4:7])  # a row does not see its batch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 33, 4096, 5001])
def test_mask_logits(dtype: torch.dtype, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    bits = rng.random((3, -(-vocab // 32) * 32)) < 0.5
    packed = torch.from_numpy(np.packbits(bits, axis=1, bitorder="little")).to(DEVICE)
    numbers = [1, -1, 0, 2, 1]
    wide = randn(5, vocab + 3, dtype=dtype)  # rows of a longer memory
    before = wide.clone()
    found = triton_masks.mask_logits(wide[:, :vocab], packed, torch.tensor(numbers).to(DEVICE))
    expected = wide[:, :vocab].double().cpu().numpy().copy()
    for row, number in enumerate(numbers):
        if number >= 0:
            expected[row, ~bits[number, :vocab]] = -np.inf
    assert np.array_equal(found.double().cpu().numpy(), expected) and found.dtype == dtype
    assert torch.equal(wide, before)
