"""The arithmetic of cutting tensors over ranks. Pure functions on integers: no torch, no communicator.

A *slot* is one canonical tensor of the decoder, unsharded and unfused (`layers.3.attn.q.weight`). A rank owns
*shards* (`layers.3.attn.qkv.weight`): each a tensor put together from *pieces*, rectangles of slots. The same
table of shards drives the loader, the builder, re-sharding and `distllm plan`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from distllm.errors import LayoutError


@dataclass(frozen=True)
class Piece:
    """A rectangle of one slot and where it lands in a shard: dst[dst_start : dst_start + (stop - start)] on
    `dim`, of the matrix that begins at row dst_row.

    Only one dimension is ever cut; the others are taken whole. Rows past the slot's end do not exist: what no
    piece covers is padding, zero.
    """

    slot: str
    dim: int
    start: int
    stop: int
    dst_start: int
    dst_row: int = 0  # other than 0 in stacks of matrices

    def part(self, start: int, stop: int) -> Piece:
        """What it holds of [start, stop) of the slot, and where."""
        return replace(self, start=start, stop=stop, dst_start=self.dst_start + start - self.start)

    def shape(self, matrix_shape: tuple[int, ...]) -> tuple[int, ...]:
        """matrix_shape: of the slot, or of the shard (its matrix, in a stack): alike but for `dim`."""
        return (*matrix_shape[: self.dim], self.stop - self.start, *matrix_shape[self.dim + 1 :])

    def origin(self, num_dims: int) -> tuple[int, ...]:
        """Where it begins in the shard, as TensorShard.flat_shape counts."""
        start = [0] * num_dims
        start[self.dim] = self.dst_start
        start[0] += self.dst_row
        return tuple(start)


@dataclass(frozen=True)
class TensorShard:
    """One tensor that a rank owns, in load order. shape is the local one; three dimensions are a stack."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Of each matrix of a stack; else its own."""
        return self.shape[-2:]

    @property
    def flat_shape(self) -> tuple[int, ...]:
        """A stack as one matrix, of all rows one below the other; else its own."""
        return (self.shape[0] * self.shape[1], self.shape[2]) if len(self.shape) == 3 else self.shape


def split_range(total: int, parts: int, index: int) -> tuple[int, int]:
    """[start, stop) of part `index`; sizes differ by at most one, larger parts first."""
    small, extra = divmod(total, parts)
    start = index * small + min(index, extra)
    return start, start + small + (index < extra)


def split_exact(total: int, parts: int, index: int, what: str) -> tuple[int, int]:
    """[start, stop) of part `index` of a total that must divide; `what` names it in the error."""
    if total % parts:
        raise LayoutError(f"{what} {total} is not divisible by tp {parts}; choose a tp that divides {total}")
    size = total // parts
    return index * size, (index + 1) * size


def split_layers(num_layers: int, pp_size: int, pp_rank: int) -> range:
    """The layers of one stage. The last stage also holds the head, so larger parts come first."""
    if pp_size > num_layers:
        raise LayoutError(
            f"pp {pp_size} is more than the model's {num_layers} layers; use -pp {num_layers} or less"
        )
    return range(*split_range(num_layers, pp_size, pp_rank))


def split_kv_heads(num_kv_heads: int, tp_size: int, tp_rank: int) -> tuple[int, int]:
    """[start, stop) of this rank's KV heads; fewer KV heads than ranks: tp/kv ranks hold each of them."""
    if num_kv_heads >= tp_size:
        return split_exact(num_kv_heads, tp_size, tp_rank, "num_key_value_heads")
    if tp_size % num_kv_heads:
        raise LayoutError(
            f"tp {tp_size} is not a multiple of num_key_value_heads {num_kv_heads}, so that they cannot "
            f"be replicated evenly; choose a tp that divides {num_kv_heads} or is a multiple of it"
        )
    head = tp_rank * num_kv_heads // tp_size
    return head, head + 1


def split_heads(num_heads: int, num_kv_heads: int, tp_size: int, tp_rank: int) -> tuple[int, int]:
    """[start, stop) of this rank's query heads: all that read its KV heads; where several ranks hold one KV
    head, their parts of the heads that read it, which differ by at most one.

    So 71 heads on one KV head are 9 on each of seven ranks and 8 on the eighth: nothing needs padding.
    """
    group = num_heads // num_kv_heads
    first, last = split_kv_heads(num_kv_heads, tp_size, tp_rank)
    if num_kv_heads >= tp_size:
        return first * group, last * group
    sharing = tp_size // num_kv_heads
    start, stop = split_range(group, sharing, tp_rank % sharing)
    return first * group + start, first * group + stop


def padded_vocab_rows(vocab_size: int, tp_size: int) -> int:
    """Rows of the vocabulary that each rank holds: the vocabulary rounded up to a multiple of tp, over tp."""
    return -(-vocab_size // tp_size)


def valid_tp_sizes(num_heads: int, num_kv_heads: int) -> list[int]:
    """Every tp that cuts or replicates the KV heads evenly and leaves each rank a query head."""
    return [tp for tp in range(1, num_heads + 1) if num_kv_heads % tp == 0 or tp % num_kv_heads == 0]


Span = tuple[int, int]  # [start, stop) of one slot's rows or columns


def replicated(name: str, *shape: int) -> TensorShard:
    """A tensor that every rank holds whole (norm gains)."""
    return TensorShard(name, shape, (Piece(name, 0, 0, shape[0], 0),))


def column_shards(
    name: str, parts: list[tuple[str, Span]], in_features: int, bias: bool
) -> Iterator[TensorShard]:
    """Output features cut: the spans of several slots stacked, for weight and bias alike.

    Each slot is cut for itself, so that a rank's q meets its own k and v, and its gate its own up.
    """
    rows = sum(stop - start for _, (start, stop) in parts)
    yield TensorShard(f"{name}.weight", (rows, in_features), _stack("weight", parts))
    if bias:
        yield TensorShard(f"{name}.bias", (rows,), _stack("bias", parts))


def _stack(kind: str, parts: list[tuple[str, Span]]) -> tuple[Piece, ...]:
    pieces, row = [], 0
    for slot, (start, stop) in parts:
        pieces.append(Piece(f"{slot}.{kind}", 0, start, stop, row))
        row += stop - start
    return tuple(pieces)


def row_shards(name: str, span: Span, out_features: int, bias: bool) -> Iterator[TensorShard]:
    """Input features cut. The bias stays whole: it is added once, after the sum over ranks."""
    start, stop = span
    weight = f"{name}.weight"
    yield TensorShard(weight, (out_features, stop - start), (Piece(weight, 1, start, stop, 0),))
    if bias:
        yield replicated(f"{name}.bias", out_features)


def stacked(name: str, shards: list[TensorShard]) -> TensorShard:
    """Matrices of one shape as one tensor, [len(shards), rows, columns]."""
    rows = shards[0].shape[0]
    pieces = [
        replace(piece, dst_row=number * rows) for number, shard in enumerate(shards) for piece in shard.pieces
    ]
    return TensorShard(name, (len(shards), *shards[0].shape), tuple(pieces))


def vocab_shard(name: str, vocab_size: int, hidden_size: int, tp_size: int, tp_rank: int) -> TensorShard:
    """The same number of vocabulary rows on every rank; rows past the vocabulary are padding."""
    rows = padded_vocab_rows(vocab_size, tp_size)
    start, stop = tp_rank * rows, min((tp_rank + 1) * rows, vocab_size)
    pieces = (Piece(name, 0, start, stop, 0),) if start < stop else ()
    return TensorShard(name, (rows, hidden_size), pieces)
