"""benchmarks/ablation.py: every rung runs, and every patch reaches what it takes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ablation
from distllm import kernels
from distllm.kernels.reference import linear
from distllm.runtime.model_runner import ModelRunner
from distllm.runtime.plan import StepPlan
from tests.command import benchmark

ROOT = Path(__file__).parents[2]


def test_ladder(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "ablation.json"
    args = ["--batch-size", "1", "--batch-size", "2", "--num-steps", "4", "-o", str(file)]
    done = benchmark("ablation.py", tiny, *args)
    assert done.returncode == 0, done.stderr
    pieces = [piece for piece in ablation.PIECES if piece != ablation.ONE_SHOT]  # for several ranks
    rungs = json.loads(file.read_text())["results"]["ablation"]
    for size in (1, 2):
        steps = [rung for rung in rungs if rung["decode"]["batch_size"] == size]
        assert [rung["piece"] for rung in steps] == ["nothing", *pieces]
        assert steps[0]["gain_percent"] == 0
        assert all(rung["piece"] in done.stdout for rung in steps)


def test_plain_operations_take_the_place_of_fused_kernels() -> None:
    pytest.importorskip("triton")
    triton = kernels._triton
    with ablation.plain_operations():
        assert kernels._triton("linear", "linear_add") is linear.linear_add
        assert kernels._triton("attention", "paged_attention") is triton("attention", "paged_attention")
    assert kernels._triton is triton


def test_full_launches_change_what_kernels_are_launched_with(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from distllm.kernels.triton import launch, norm

    monkeypatch.setitem(launch.OVERLAP, "launch_pdl", True)
    with ablation.full_launches():
        assert norm.OVERLAP == {}
    assert norm.OVERLAP["launch_pdl"]


def test_steps_end_before_the_next_without_planning_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(ModelRunner, "run", lambda *_: seen.append("run"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("wait"))
    runner: Any = None
    with ablation.no_planning_ahead():
        ModelRunner.run(runner, StepPlan(0))
    assert seen == ["run", "wait"]
