"""What LLM.watch_steps is given: a clock of the host's parts, and a profiler of some steps.

The clock is for runs in which nothing is recorded: a profiler slows the host.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from distllm.ops.bench.trace import Trace, read_trace
from distllm.runtime.coordinator import PARTS

LAUNCH = "launch"
assert LAUNCH in PARTS, "whatever a step starts on the device, it starts there"


class StepClock:
    """Seconds of each part of each step; itself what is entered around a part."""

    def __init__(self) -> None:
        self.starts: list[float] = []  # of each step
        self.steps: list[dict[str, float]] = []
        self._part = PARTS[0]

    def __call__(self, part: str) -> StepClock:
        self._part = part
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        if self._part == PARTS[0]:
            self.starts.append(self._start)
            self.steps.append({})

    def __exit__(self, *_error: object) -> None:
        self.steps[-1][self._part] = time.perf_counter() - self._start


class StepRecorder:
    """Runs a profiler over num_steps steps of a longer run, from step first on, and names their parts."""

    def __init__(self, profiler: profile, first: int, num_steps: int) -> None:
        self._profiler = profiler
        self._first, self._end = first, first + num_steps
        self._step = 0

    def __call__(self, part: str) -> record_function:
        if part == PARTS[0]:
            self._next_step()
        return record_function(part)

    def _next_step(self) -> None:
        if self._step == self._first:
            self._profiler.start()
        elif self._step == self._end:
            self._profiler.stop()  # waits until all that was launched has run
        self._step += 1


def new_profiler(device: torch.device) -> profile:
    """Of the host, and of the GPU if there is one."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities, acc_events=True)


def read_recording(profiler: profile, trace_dir: Path | None, case: str) -> Trace:
    """What was recorded, as steps; with a folder, also its Chrome trace there."""
    if trace_dir is not None:
        profiler.export_chrome_trace(str(trace_dir / f"{case}.json.gz"))
    return read_trace(profiler.events(), LAUNCH)
