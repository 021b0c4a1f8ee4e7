"""Every case runs, and says how much it reads, writes and computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distllm.models.moe_spec import MoESpec
from distllm.ops.bench.floors import Ceilings
from distllm.ops.bench.kernel_cases import Case, StepCases
from distllm.ops.bench.kernels import run_case
from distllm.ops.bench.operations import stage_linears
from distllm.parallel.layout import RankLayout
from tests.specs import llama_spec

CPU = torch.device("cpu")
SPEC = llama_spec(dtype="bfloat16")


def cases(tp: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Case]:
    found = list(StepCases(SPEC, tp, dtype, CPU).decode(3, 37))
    return {case.operation: case for case in found}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_case_runs(tp: int, dtype: torch.dtype) -> None:
    steps = StepCases(SPEC, tp, dtype, CPU)
    for case in [*steps.decode(1, 16), *steps.decode(3, 37), *steps.prefill(35)]:
        result = case.make()()
        parts = result if isinstance(result, tuple) else (result,)
        floats = [t for t in parts if isinstance(t, torch.Tensor) and t.is_floating_point()]
        assert all(t.isfinite().all() for t in floats), case.operation


def test_bytes_and_flop_by_hand() -> None:
    decode = cases()
    attention = decode["paged_attention"]
    assert attention.num_bytes == 4 * (3 * 37 * 2 * 2 * 6 + 2 * 3 * 4 * 6)
    assert attention.num_flop == 4 * 3 * 37 * 4 * 6
    linear = decode["linear mlp.gate_up"]
    assert linear.num_bytes == 4 * (80 * 24 + 3 * (24 + 80))
    assert linear.num_flop == 2 * 3 * 24 * 80
    assert decode["add_rms_norm"].num_bytes == 4 * 4 * 3 * 24
    assert decode["activation"].num_bytes == 4 * 3 * 3 * 40
    assert decode["sample_tokens"].num_bytes == 4 * 3 * 50
    assert cases(tp=2)["linear mlp.down"].num_flop == linear.num_flop // 4
    assert cases(dtype=torch.bfloat16)["linear head"].num_bytes == 2 * (50 * 24 + 3 * (24 + 50))


MIXTURE = replace(SPEC, moe=MoESpec(6, 2, 10, renormalize=True, dense_layers=(1,)))


def test_layers_with_and_without_experts() -> None:
    for n in (1, 2, 5):
        steps = StepCases(MIXTURE, 2, torch.float32, CPU)
        decode = {case.operation: case for case in steps.decode(n, 16)}
        mix, expert = decode["expert_mlp"], 3 * 24 * 5
        assert mix.num_bytes == 4 * (min(6, 2 * n) * expert + 2 * n * 24)
        assert mix.num_flop == 2 * 2 * n * expert
        assert mix.make()().isfinite().all()
        shares, experts = decode["route"].make()()
        assert shares.shape == experts.shape == (n, 2) and decode["route"].num_bytes == n * (4 * 6 + 2 * 12)
        assert {f"linear {name}" for name in stage_linears(MIXTURE, RankLayout(2))} <= set(decode)
    assert stage_linears(MIXTURE, RankLayout())[2:6] == ["moe.router", "attn.qkv", "attn.o", "mlp.gate_up"]


def test_prefill_attention_counts_causal_pairs() -> None:
    prefill = {case.operation: case for case in StepCases(SPEC, 1, torch.float32, CPU).prefill(5)}
    assert prefill["paged_attention"].num_flop == 4 * (1 + 2 + 3 + 4 + 5) * 4 * 6


def test_the_ceiling_is_the_longer_of_reading_and_arithmetic() -> None:
    case = replace(cases()["linear attn.o"], num_bytes=100, num_flop=5000)
    by_bytes = run_case(case, CPU, Ceilings(read_bytes_per_s=1.0, flop_per_s=1e9))
    assert by_bytes.floor_s == 100.0
    by_flop = run_case(case, CPU, Ceilings(read_bytes_per_s=1e9, flop_per_s=1.0))
    assert by_flop.floor_s == 5000.0
    assert by_flop.ceiling_percent == pytest.approx(100 * 5000 / by_flop.time_s.median)
