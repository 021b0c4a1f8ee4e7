"""The arithmetic of cutting: parts cover the whole once, and refusals say what would work."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distllm.errors import LayoutError
from distllm.parallel.sharding import (
    column_shards,
    padded_vocab_rows,
    row_shards,
    split_exact,
    split_heads,
    split_kv_heads,
    split_layers,
    split_range,
    valid_tp_sizes,
    vocab_shard,
)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 500), st.integers(1, 40))
def test_split_range_covers_once_and_evenly(total: int, parts: int) -> None:
    spans = [split_range(total, parts, index) for index in range(parts)]
    assert [n for start, stop in spans for n in range(start, stop)] == list(range(total))
    sizes = [stop - start for start, stop in spans]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 80))
def test_every_query_head_meets_its_kv_head(num_kv_heads: int, group: int) -> None:
    """On every rank of every valid tp: query head h reads KV head h // group, by its local number too."""
    num_heads = num_kv_heads * group
    for tp_size in valid_tp_sizes(num_heads, num_kv_heads)[:20]:
        every, sizes = [], set()
        for rank in range(tp_size):
            first, last = split_heads(num_heads, num_kv_heads, tp_size, rank)
            kv_first, kv_last = split_kv_heads(num_kv_heads, tp_size, rank)
            local_group, rest = divmod(last - first, kv_last - kv_first)
            assert rest == 0 and local_group > 0
            for head in range(first, last):
                assert kv_first + (head - first) // local_group == head // group
            every += range(first, last)
            sizes.add(last - first)
        assert every == list(range(num_heads)) and max(sizes) - min(sizes) <= 1


def test_valid_tp_sizes() -> None:
    assert valid_tp_sizes(32, 8) == [1, 2, 4, 8, 16, 24, 32]
    assert valid_tp_sizes(71, 1) == list(range(1, 72))
    assert valid_tp_sizes(6, 3) == [1, 3, 6]
    assert valid_tp_sizes(12, 4) == [1, 2, 4, 8, 12]


def test_falcon_7b() -> None:
    """71 heads, a prime, on one KV head."""
    spans = [split_heads(71, 1, 8, rank) for rank in range(8)]
    assert [last - first for first, last in spans] == [9] * 7 + [8]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(1, 16), st.integers(1, 9))
def test_vocabulary_is_covered_once(vocab_size: int, tp_size: int, hidden_size: int) -> None:
    shards = [vocab_shard("v", vocab_size, hidden_size, tp_size, rank) for rank in range(tp_size)]
    assert {shard.shape for shard in shards} == {(padded_vocab_rows(vocab_size, tp_size), hidden_size)}
    rows = [row for shard in shards for piece in shard.pieces for row in range(piece.start, piece.stop)]
    assert rows == list(range(vocab_size))
    for rank, shard in enumerate(shards):  # a token's row is where `embed` looks for it
        assert all(piece.start == rank * shard.shape[0] and piece.dst_start == 0 for piece in shard.pieces)


def test_column_shards_stack_each_slot_s_own_span() -> None:
    weight, bias = column_shards("qkv", [("q", (4, 8)), ("k", (2, 3)), ("v", (2, 3))], 5, bias=True)
    assert (weight.shape, bias.shape) == ((6, 5), (6,))
    for shard, kind in ((weight, "weight"), (bias, "bias")):
        found = [(piece.slot, piece.dim, piece.start, piece.stop, piece.dst_start) for piece in shard.pieces]
        assert found == [(f"q.{kind}", 0, 4, 8, 0), (f"k.{kind}", 0, 2, 3, 4), (f"v.{kind}", 0, 2, 3, 5)]


def test_row_shards_cut_columns_and_keep_the_bias_whole() -> None:
    weight, bias = row_shards("down", (3, 7), 5, bias=True)
    assert weight.shape == (5, 4) and bias.shape == (5,)
    assert (weight.pieces[0].dim, weight.pieces[0].start, weight.pieces[0].stop) == (1, 3, 7)
    assert (bias.pieces[0].start, bias.pieces[0].stop) == (0, 5)


def test_refusals_name_value_and_limit() -> None:
    with pytest.raises(LayoutError, match="pp 5 is more than the model's 4 layers"):
        split_layers(4, 5, 0)
    with pytest.raises(LayoutError, match="heads 10 is not divisible by tp 4"):
        split_exact(10, 4, 0, "heads")
    with pytest.raises(LayoutError, match="tp 6 is not a multiple of num_key_value_heads 4"):
        split_kv_heads(4, 6, 0)
