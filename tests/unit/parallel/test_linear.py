"""Parallel linears and the vocabulary's two ends against the uncut product in fp64, ranks as threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from distllm.comm.base import TensorComm
from distllm.comm.local import LocalControl, run_ranks
from distllm.kernels import add_rms_norm, sample_tokens
from distllm.parallel.linear import (
    ColumnParallelLinear,
    GatedColumnParallelLinear,
    PartialSum,
    RowParallelLinear,
)
from distllm.parallel.sharding import padded_vocab_rows, split_range
from distllm.parallel.stream import LayerNorm, RMSNorm, Stream
from distllm.parallel.vocab import VocabParallelEmbedding, VocabParallelHead

SIZES = [1, 2, 3, 4]


def on_ranks(size: int, fn: Callable[[TensorComm], torch.Tensor]) -> list[torch.Tensor]:
    def rank(control: LocalControl) -> torch.Tensor:
        return fn(control.split(0, control.rank))

    return run_ranks(size, rank)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


def normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain.double()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_column_then_row(size: int, bias: bool) -> None:
    """Norm, two layers with a cut between them, 11 features on up to 4 ranks, residual; biases counted
    once.
    """
    x, gain, up, down = torch.randn(5, 6), torch.randn(6), torch.randn(11, 6), torch.randn(6, 11)
    up_bias, down_bias = (torch.randn(11), torch.randn(6)) if bias else (None, None)

    def rank(tp: TensorComm) -> torch.Tensor:
        start, stop = split_range(11, tp.size, tp.rank)
        cut_bias = None if up_bias is None else up_bias[start:stop]
        column = ColumnParallelLinear(up[start:stop], cut_bias, RMSNorm(gain, 1e-5))
        stream = Stream(x.clone())
        return RowParallelLinear(down[:, start:stop], PartialSum(tp, down_bias))(
            column(stream), stream
        ).hidden

    found = on_ranks(size, rank)
    wide = [None if b is None else b.double() for b in (up_bias, down_bias)]
    wanted = x.double() + F.linear(F.linear(normed(x, gain), up.double(), wide[0]), down.double(), wide[1])
    assert all(torch.equal(y, found[0]) for y in found)
    torch.testing.assert_close(found[0].double(), wanted, atol=1e-5, rtol=0)


def test_gated_column_reads_what_is_normed_already() -> None:
    """silu(gate) · up in fp64; a stream that brings its normed form is not normed again."""
    x, gain, weight, bias = torch.randn(5, 6), torch.randn(6), torch.randn(8, 6), torch.randn(8)
    gate, up = F.linear(normed(x, gain), weight.double(), bias.double()).chunk(2, -1)
    column = GatedColumnParallelLinear(weight, bias, RMSNorm(gain, 1e-5), "silu")
    for stream in (Stream(x), Stream(torch.full_like(x, torch.nan), normed(x, gain).float())):
        torch.testing.assert_close(column(stream).double(), F.silu(gate) * up, atol=1e-5, rtol=1e-5)


def padded(weight: torch.Tensor, tp: TensorComm) -> torch.Tensor:
    rows = padded_vocab_rows(len(weight), tp.size)
    return F.pad(weight, (0, 0, 0, rows * tp.size - len(weight)))[tp.rank * rows : (tp.rank + 1) * rows]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("vocab_size", [5, 12, 13])
def test_vocabulary_ends(size: int, vocab_size: int) -> None:
    """Lookup is exact; logits come in vocabulary order, through the norm, without padding, on every rank."""
    weight = torch.randn(vocab_size, 4)
    ids, hidden = torch.arange(vocab_size).flip(0), torch.randn(3, 4, dtype=torch.bfloat16)

    looked_up = on_ranks(size, lambda tp: VocabParallelEmbedding(padded(weight, tp), tp)(ids))
    assert all(torch.equal(rows, weight[ids]) for rows in looked_up)

    narrow, gain = weight.bfloat16(), torch.randn(4, dtype=torch.bfloat16)

    def gathered(tp: TensorComm) -> torch.Tensor:
        head = VocabParallelHead(padded(narrow, tp), RMSNorm(gain, 1e-5), vocab_size, tp)
        return head.gather(head(hidden))

    logits = on_ranks(size, gathered)
    assert all(torch.equal(each, logits[0]) for each in logits)
    wanted = F.linear(normed(hidden, gain), narrow.double())
    torch.testing.assert_close(logits[0].double(), wanted, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("vocab_size", [5, 12, 131])
def test_tokens_are_chosen_where_their_logits_lie(size: int, vocab_size: int) -> None:
    """As from all logits in one place: greedy and drawn, without padding, ties to the lowest id."""
    weight, hidden = torch.randn(vocab_size, 4), torch.randn(40, 4)
    weight[vocab_size // 2] = weight[0]
    weight *= -1  # so that what pads the vocabulary, logits of 0, would often be best
    temperature, seed, positions = torch.linspace(0, 2, 40), torch.arange(40), torch.arange(40) * 7
    temperature[:10] = 0
    norm = RMSNorm(torch.ones(4), 1e-5)

    def chosen(tp: TensorComm) -> torch.Tensor:
        head = VocabParallelHead(padded(weight, tp), norm, vocab_size, tp)
        return head.best_tokens(head(hidden), temperature, seed, positions)

    logits = F.linear(normed(hidden, norm.gain).float(), weight)
    wanted = sample_tokens(logits, temperature, seed, positions)
    assert all(tokens.tolist() == wanted.tolist() for tokens in on_ranks(size, chosen))


class Fusing:
    """Two ranks of which this one's peer always sends zeros; fuses rows of an even length, by the
    reference.
    """

    rank, size = 0, 2

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def try_all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None if x.shape[1] % 2 else add_rms_norm(x, residual, weight, eps)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out", [6, 7])
def test_row_fuses_the_next_norm_where_it_can(out: int, bias: bool) -> None:
    """The sum, the residual and the norm; a bias is never left out, so it is never fused."""
    x, residual, weight, gain = (
        torch.randn(5, 11),
        torch.randn(5, out),
        torch.randn(out, 11),
        torch.randn(out),
    )
    offset = torch.randn(out) if bias else None
    total = residual.double() + F.linear(
        x.double(), weight.double(), offset if offset is None else offset.double()
    )

    row = RowParallelLinear(weight, PartialSum(Fusing(), offset))  # type: ignore[arg-type]
    stream = row(x, Stream(residual.clone()), RMSNorm(gain, 1e-5))
    torch.testing.assert_close(stream.hidden.double(), total, atol=1e-5, rtol=1e-5)
    assert (stream.normed is not None) == (not bias and out % 2 == 0)
    if stream.normed is not None:
        torch.testing.assert_close(stream.normed.double(), normed(total, gain), atol=1e-5, rtol=1e-5)


def test_row_leaves_to_others_what_a_kernel_cannot_norm() -> None:
    """A gain in fp32 behind a stream in bf16, and a LayerNorm: summed alone, normed by whoever reads."""
    x, weight, residual = (torch.randn(shape).bfloat16() for shape in ((5, 11), (6, 11), (5, 6)))
    row = RowParallelLinear(weight, PartialSum(Fusing()))  # type: ignore[arg-type]
    gain, bias = torch.randn(6), torch.randn(6)
    for norm in (RMSNorm(gain, 1e-5), LayerNorm(gain.bfloat16(), bias.bfloat16(), 1e-5)):
        stream = row(x, Stream(residual.clone()), norm)
        assert stream.normed is None
        read, left = stream.read(norm)
        assert left is norm if isinstance(norm, RMSNorm) else torch.equal(read, norm(stream.hidden))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_row_norms_what_it_adds(size: int, bias: bool) -> None:
    """The whole sum with its bias, not each rank's part; the residual stays outside of the norm."""
    x, weight, residual, gain = torch.randn(5, 11), torch.randn(6, 11), torch.randn(5, 6), torch.randn(6)
    offset = torch.randn(6) if bias else None

    def rank(tp: TensorComm) -> torch.Tensor:
        start, stop = split_range(11, tp.size, tp.rank)
        row = RowParallelLinear(weight[:, start:stop], PartialSum(tp, offset, RMSNorm(gain, 1e-5)))
        return row(x[:, start:stop], Stream(residual.clone())).hidden

    added = F.linear(x.double(), weight.double(), offset if offset is None else offset.double())
    for found in on_ranks(size, rank):
        torch.testing.assert_close(found.double(), residual + normed(added, gain), atol=1e-5, rtol=1e-5)
