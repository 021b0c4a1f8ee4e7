"""The clock and the recorder of steps, with a time that only the test moves; kernels of steps, added up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from distllm.ops.bench.profile import kernel_times
from distllm.ops.bench.recording import StepClock, StepRecorder
from distllm.ops.bench.trace import Span, Work
from distllm.runtime.coordinator import PARTS


def test_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    clock = StepClock()
    for step in range(3):
        for number, part in enumerate(PARTS):
            with clock(part):
                now += step + number
        now += 100
    total = sum(range(len(PARTS)))
    assert clock.starts == [0, 100 + total, 200 + 2 * total + len(PARTS)]
    assert clock.steps == [{part: step + n for n, part in enumerate(PARTS)} for step in range(3)]


def test_recorder_covers_just_these_steps() -> None:
    seen: list[str] = []
    profiler: Any = SimpleNamespace(start=lambda: seen.append("start"), stop=lambda: seen.append("stop"))
    recorder = StepRecorder(profiler, first=2, num_steps=3)
    for number in range(8):
        for part in PARTS:
            with recorder(part):
                seen.append(f"{part} {number}")
    assert [seen[seen.index(what) + 1] for what in ("start", "stop")] == ["schedule 2", "schedule 5"]
    assert len(seen) == 8 * len(PARTS) + 2


def test_kernel_times() -> None:
    """Two steps of two linears, one copy in the first alone."""
    linear, copy = Work("_gemv_kernel", Span(0, 30), 30), Work("Memcpy HtoD (Pinned)", Span(0, 40), 10)
    steps = [[linear, copy, linear], [linear, linear]]
    first, second = kernel_times("case", steps, 2, ["mlp.up", "mlp.up"], {"linear mlp.up": 15e-6})
    assert (first.kernel, first.operation, first.calls_per_step) == ("_gemv_kernel", "linear mlp.up", 2)
    assert (first.s_per_step, first.floor_s, first.floor_percent) == pytest.approx((60e-6, 30e-6, 50))
    assert (second.kernel, second.operation, second.floor_s) == ("Memcpy HtoD", "", None)
    assert (second.calls_per_step, second.s_per_step) == pytest.approx((0.5, 5e-6))
    assert first.share_percent + second.share_percent == pytest.approx(100)
