"""Parallel linears and the vocabulary's two ends against the uncut product in fp64, ranks as threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from distllm.comm.base import TensorComm
from distllm.comm.local import LocalControl, run_ranks
from distllm.kernels import rms_norm
from distllm.parallel.linear import ColumnParallelLinear, RowParallelLinear
from distllm.parallel.sharding import padded_vocab_rows, split_range
from distllm.parallel.vocab import VocabParallelEmbedding, VocabParallelHead

SIZES = [1, 2, 3, 4]


def on_ranks(size: int, fn: Callable[[TensorComm], torch.Tensor]) -> list[torch.Tensor]:
    def rank(control: LocalControl) -> torch.Tensor:
        return fn(control.split(0, control.rank))

    return run_ranks(size, rank)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_column_then_row(size: int, bias: bool) -> None:
    """Norm and two layers, a cut between them, 11 features on up to 4 ranks; biases count once."""
    x, up, down = torch.randn(5, 7), torch.randn(11, 7), torch.randn(6, 11)
    gain, residual = torch.randn(7), torch.randn(5, 6)
    up_bias, down_bias = (torch.randn(11), torch.randn(6)) if bias else (None, None)

    def rank(tp: TensorComm) -> torch.Tensor:
        start, stop = split_range(11, tp.size, tp.rank)
        local_bias = None if up_bias is None else up_bias[start:stop]
        column = ColumnParallelLinear(up[start:stop], local_bias, gain, 1e-6)
        stream = residual.clone()
        y = RowParallelLinear(down[:, start:stop], down_bias, tp)(column(x), stream)
        assert y is stream, "the residual is added to in place"
        return y

    found = on_ranks(size, rank)
    wide = [None if b is None else b.double() for b in (up_bias, down_bias)]
    normed = F.rms_norm(x.double(), (7,), gain.double(), 1e-6)
    wanted = residual + F.linear(F.linear(normed, up.double(), wide[0]), down.double(), wide[1])
    assert all(torch.equal(y, found[0]) for y in found)
    torch.testing.assert_close(found[0].double(), wanted, atol=1e-5, rtol=0)


def padded(weight: torch.Tensor, tp: TensorComm) -> torch.Tensor:
    rows = padded_vocab_rows(len(weight), tp.size)
    return F.pad(weight, (0, 0, 0, rows * tp.size - len(weight)))[tp.rank * rows : (tp.rank + 1) * rows]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("vocab_size", [5, 12, 13])
def test_vocabulary_ends(size: int, vocab_size: int) -> None:
    """Lookup is exact; logits come in vocabulary order, without padding, on every rank."""
    weight, gain = torch.randn(vocab_size, 4), torch.randn(4).bfloat16()
    ids, hidden = torch.arange(vocab_size).flip(0), torch.randn(3, 4, dtype=torch.bfloat16)

    looked_up = on_ranks(size, lambda tp: VocabParallelEmbedding(padded(weight, tp), tp)(ids))
    assert all(torch.equal(rows, weight[ids]) for rows in looked_up)

    narrow = weight.bfloat16()
    logits = on_ranks(
        size, lambda tp: VocabParallelHead(padded(narrow, tp), gain, 1e-6, vocab_size, tp)(hidden)
    )
    assert all(torch.equal(each, logits[0]) and each.dtype == torch.bfloat16 for each in logits)
    torch.testing.assert_close(
        logits[0], F.linear(rms_norm(hidden, gain, 1e-6), narrow), atol=0.05, rtol=0.02
    )
