"""Floors against arithmetic by hand, and against the published table of the roofline model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from distllm.engine import read_spec
from distllm.ops.bench.floors import Ceilings, ExpertCost, Floors, StageCost, stage_costs

SHAPES = Path(__file__).parents[3] / "benchmarks/shapes"
H100 = Ceilings(read_bytes_per_s=3.0e12, flop_per_s=790e12)
H200 = Ceilings(read_bytes_per_s=4.3e12, flop_per_s=790e12)


def floors(shape: str, ceilings: Ceilings, tp: int = 1, pp: int = 1) -> Floors:
    folder = SHAPES / (shape if "-" in shape else f"llama-{shape}")
    return Floors(stage_costs(read_spec(folder), tp, pp, 2), ceilings)


def test_costs_of_8b_by_hand() -> None:
    (cost,) = floors("8b", H100).costs
    layer = 4096 * (32 + 2 * 8) * 128 + 4096 * 4096 + 2 * 14336 * 4096 + 4096 * 14336
    assert cost == StageCost(
        weight_bytes=2 * (32 * (layer + 2 * 4096) + 4096 + 128256 * 4096),
        layer_params=32 * layer,
        head_params=128256 * 4096,
        kv_bytes_per_token=131072,
        attention_flop_per_pair=4 * 32 * 32 * 128,
    )


def test_floors_of_a_toy_by_hand() -> None:
    """10 bytes/s and 100 flop/s: reading takes 4 s, one row's arithmetic 0.6 s, a token's KV 0.2 s."""
    toy = Floors([StageCost(40, 20, 10, 2, 4)], Ceilings(10, 100))
    assert toy.decode_step_s(1, 5) == pytest.approx(4 + 1 * 5 * 0.2)
    assert toy.decode_step_s(10, 5) == pytest.approx(6 + 10 * 5 * 0.2)
    assert toy.first_token_s(1) == pytest.approx(4)
    assert toy.first_token_s(20) == pytest.approx((2 * (20 * 20 + 10) + 4 * 20 * 20 / 2) / 100)
    assert toy.output_tokens_per_s(10, 3, 4) == pytest.approx(1 / (0.6 + 5 * 0.2 + (140 + 18) / 100 / 4))


def test_costs_of_mixtral_by_hand() -> None:
    (cost,) = floors("mixtral-8x7b", H100, tp=2).costs
    dense = 4096 * (16 + 2 * 4) * 128 + 16 * 128 * 4096 + 8 * 4096
    expert = 3 * 4096 * 7168
    assert cost.experts == ExpertCost(8, 2, 2 * 32 * 8 * expert)
    assert cost.layer_params == 32 * (dense + 2 * expert)
    assert cost.weight_bytes == 2 * (32 * (dense + 2 * 4096) + 4096 + 16000 * 4096)
    assert cost.read_bytes(1) == pytest.approx(cost.weight_bytes + 2 * 32 * 2 * expert)
    assert cost.read_bytes(1000) == pytest.approx(cost.weight_bytes + 2 * 32 * 8 * expert)


def test_active_parameters_of_qwen3_30b_a3b() -> None:
    """Published: 3.3 billion, the embedding included, which a step does not multiply with."""
    (cost,) = floors("qwen3-30b-a3b", H100).costs
    assert cost.layer_params + 2 * cost.head_params == pytest.approx(3.35e9, rel=0.01)


def test_experts_touched_by_draws() -> None:
    rng, cost = random.Random(0), ExpertCost(8, 2, 800)
    draws = [len({e for _ in range(5) for e in rng.sample(range(8), 2)}) for _ in range(20000)]
    assert cost.read_bytes(5) == pytest.approx(100 * sum(draws) / len(draws), rel=0.01)


@pytest.mark.parametrize(("batch", "expected_ms"), [(1, 5.05), (8, 5.36), (64, 7.87), (256, 16.5)])
def test_decode_of_8b_on_one_h100(batch: int, expected_ms: float) -> None:
    assert floors("8b", H100).decode_step_s(batch, 1024) * 1e3 == pytest.approx(expected_ms, rel=0.01)


@pytest.mark.parametrize(("length", "expected_ms"), [(128, 5.0), (1024, 18.4), (2048, 37.6), (8192, 167)])
def test_first_token_of_8b_on_one_h100(length: int, expected_ms: float) -> None:
    assert floors("8b", H100).first_token_s(length) * 1e3 == pytest.approx(expected_ms, rel=0.01)


def test_a_tied_embedding_is_read_once_as_the_head() -> None:
    assert floors("1b", H100).costs[0].weight_bytes == pytest.approx(2.47e9, rel=0.002)
    first, last = floors("1b", H100, pp=2).costs
    assert first.head_params == 0 and last.head_params == 128256 * 2048
    assert last.weight_bytes - first.weight_bytes == 2 * (128256 * 2048 + 2048)


def test_tensor_parallel_ranks_share_the_work() -> None:
    """8.92 ms of the table without its 0.82 ms of messages."""
    assert floors("70b", H200, tp=4).decode_step_s(1, 1024) * 1e3 == pytest.approx(8.10, rel=0.01)


def test_stages_read_their_weights_for_each_microbatch() -> None:
    one, two = floors("8b", H100), floors("8b", H100, pp=2)
    assert two.decode_step_s(1, 0) == pytest.approx(one.decode_step_s(1, 0))
    assert two.decode_step_s(2, 1024) == pytest.approx(one.decode_step_s(1, 1024))
    assert two.output_tokens_per_s(2, 128, 128) > one.output_tokens_per_s(1, 128, 128)


@pytest.mark.parametrize(("lengths", "expected"), [((128, 128), 21900), ((1000, 1000), 9700)])
def test_offline_ceiling_of_8b_on_one_h100(lengths: tuple[int, int], expected: float) -> None:
    assert floors("8b", H100).output_tokens_per_s(256, *lengths) == pytest.approx(expected, rel=0.02)
