"""Parallel linears and the vocabulary's two ends against the uncut product in fp64, ranks as threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from distllm.comm.base import TensorComm
from distllm.comm.local import LocalControl, run_ranks
from distllm.kernels import add_rms_norm
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
    """Two layers, a cut between them, 11 features on up to 4 ranks; biases counted once."""
    x, up, down = torch.randn(5, 7), torch.randn(11, 7), torch.randn(6, 11)
    up_bias, down_bias = (torch.randn(11), torch.randn(6)) if bias else (None, None)

    def rank(tp: TensorComm) -> torch.Tensor:
        start, stop = split_range(11, tp.size, tp.rank)
        column = ColumnParallelLinear(up[start:stop], None if up_bias is None else up_bias[start:stop])
        return RowParallelLinear(down[:, start:stop], down_bias, tp)(column(x))

    found = on_ranks(size, rank)
    wide = [None if b is None else b.double() for b in (up_bias, down_bias)]
    wanted = F.linear(F.linear(x.double(), up.double(), wide[0]), down.double(), wide[1])
    assert all(torch.equal(y, found[0]) for y in found)
    torch.testing.assert_close(found[0].double(), wanted, atol=1e-5, rtol=0)


def padded(weight: torch.Tensor, tp: TensorComm) -> torch.Tensor:
    rows = padded_vocab_rows(len(weight), tp.size)
    return F.pad(weight, (0, 0, 0, rows * tp.size - len(weight)))[tp.rank * rows : (tp.rank + 1) * rows]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("vocab_size", [5, 12, 13])
def test_vocabulary_ends(size: int, vocab_size: int) -> None:
    """Lookup is exact; logits come in vocabulary order, without padding, in fp32, on every rank."""
    weight = torch.randn(vocab_size, 4)
    ids, hidden = torch.arange(vocab_size).flip(0), torch.randn(3, 4, dtype=torch.bfloat16)

    looked_up = on_ranks(size, lambda tp: VocabParallelEmbedding(padded(weight, tp), tp)(ids))
    assert all(torch.equal(rows, weight[ids]) for rows in looked_up)

    narrow = weight.bfloat16()
    logits = on_ranks(size, lambda tp: VocabParallelHead(padded(narrow, tp), vocab_size, tp)(hidden))
    assert all(torch.equal(each, logits[0]) and each.dtype == torch.float32 for each in logits)
    torch.testing.assert_close(logits[0], F.linear(hidden, narrow).float(), atol=0.05, rtol=0.01)


class Fusing:
    """A communicator of one rank that fuses rows of an even length, by the reference."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.fused: list[int] = []

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def try_all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        self.fused.append(x.shape[1])
        return None if x.shape[1] % 2 else add_rms_norm(x, residual, weight, eps)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out", [6, 7])
def test_row_then_norm(out: int, bias: bool) -> None:
    """Cut, fused or alone: the sum, the residual and the norm; a bias is never left out."""
    x, residual, weight, gain = (
        torch.randn(5, 11),
        torch.randn(5, out),
        torch.randn(out, 11),
        torch.randn(out),
    )
    offset = torch.randn(out) if bias else None
    wanted = add_rms_norm(F.linear(x, weight, offset), residual, gain, 1e-5)

    def rank(tp: TensorComm) -> torch.Tensor:
        start, stop = split_range(11, tp.size, tp.rank)
        row = RowParallelLinear(weight[:, start:stop], offset, tp)
        return torch.stack(row.add_norm(x[:, start:stop], residual, gain, 1e-5))

    fusing = Fusing()
    for found in [*on_ranks(3, rank), rank(fusing)]:  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.stack(wanted), atol=1e-5, rtol=1e-5)
    assert fusing.fused == ([] if bias else [out])
