"""`bench profile`: consecutive steps as a profiler sees them: gaps, host time, each kernel beside its floor.

Every rank of the engine runs these; rank 0 alone watches, and has results.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from torch.profiler import profile, record_function

from distllm.ops.bench.floors import Floors
from distllm.ops.bench.kernel_cases import StepCases
from distllm.ops.bench.latency import (
    NUM_FIRST_TOKENS,
    LatencyWorkload,
    Prompts,
    fixed_length,
    random_prompts,
)
from distllm.ops.bench.operations import floors_s, operations, stage_linears
from distllm.ops.bench.recording import LAUNCH, StepClock, StepRecorder, new_profiler, read_recording
from distllm.ops.bench.timing import Summary, summarize
from distllm.ops.bench.trace import Span, Step, Trace, idle_us, short_name, step_gaps
from distllm.runtime.coordinator import PARTS
from distllm.runtime.llm import LLM

PHASES = ("decode", "prefill")
NUM_SETTLING_STEPS = 4  # recorded but left out: starting the profiler holds up the host
FIRST_TOKEN = "first token"
COORDINATOR = "coordinator"  # all parts of a step but the wait for a result

OperationFloors = dict[str, float]  # seconds of one call


@dataclass(frozen=True)
class StepsResult:
    """Consecutive decode steps of a full batch. Gaps and idle time are None without a GPU."""

    batch_size: int
    input_len: int
    context_len: float  # mean over the recorded steps
    step_s: Summary  # from one plan to the next, nothing recorded
    recorded_step_s: Summary  # the same while recording
    busy_s: Summary  # of a step, in which anything ran
    gap_s: Summary | None  # from the last kernel of a step's graph to the first of the next one's
    idle_s: Summary | None  # of a gap, in which nothing ran, not even a copy


@dataclass(frozen=True)
class HostTime:
    """Rank 0's host in the same steps, nothing recorded."""

    batch_size: int
    input_len: int
    part: str  # of coordinator.PARTS, or COORDINATOR
    time_s: Summary  # in one step


@dataclass(frozen=True)
class PromptResult:
    """The first token of one request alone, while recording; copies count as kernels."""

    input_len: int
    ttft_s: Summary  # from the call of stream() to its first increment: before, device and after
    before_s: Summary  # until the prompt's first kernel
    device_s: Summary  # from there to the end of its last
    busy_s: Summary  # of that, in which anything ran
    after_s: Summary


@dataclass(frozen=True)
class KernelTime:
    """One kernel of a step, of one prompt in prefill. Times that no kernel before it covers: they add up."""

    case: str
    kernel: str
    operation: str  # as in `bench kernels`; empty where unknown
    calls_per_step: float
    s_per_step: float
    share_percent: float  # of all kernels
    floor_s: float | None  # of as many calls of the operation
    floor_percent: float | None


@dataclass(frozen=True)
class Profile:
    """Results by kind; none on ranks other than 0."""

    steps: list[StepsResult] = field(default_factory=list)
    host: list[HostTime] = field(default_factory=list)
    prompts: list[PromptResult] = field(default_factory=list)
    kernel_times: list[KernelTime] = field(default_factory=list)


def run_profile(
    llm: LLM, workload: LatencyWorkload, phases: Collection[str], floors: Floors, trace_dir: Path | None
) -> Profile:
    """workload.output_len decode steps of each batch, num_iters first tokens of each prompt length.

    Collective: every rank of the engine. trace_dir: an existing folder for a Chrome trace of each case.
    """
    run = _Run(llm, workload, floors, trace_dir)
    for input_len in workload.input_lens:
        for batch_size in workload.batch_sizes if "decode" in phases else ():
            run.decode(batch_size, input_len)
        if "prefill" in phases:
            run.prefill(input_len)
    return run.results


@dataclass(frozen=True)
class _Run:
    """Fills results, on rank 0."""

    llm: LLM
    workload: LatencyWorkload
    floors: Floors
    trace_dir: Path | None
    results: Profile = field(default_factory=Profile)

    def decode(self, batch_size: int, input_len: int) -> None:
        num_steps = self.workload.output_len
        ramp = self.workload.ramp_len(batch_size, input_len, self.llm.config.max_num_batched_tokens)
        prompts = random_prompts(batch_size, input_len, self.llm.spec.vocab_size)
        first = ramp - 1  # nobody ends before step ramp + num_steps − 1
        clock, profiler = self._watch_decode(prompts, first, num_steps)
        if not self.llm.is_root:
            return
        case, context_len = f"decode-{batch_size}x{input_len}", input_len + ramp + num_steps / 2
        trace = read_recording(profiler, self.trace_dir, case)
        timed = slice(first, first + num_steps)
        step_s = summarize(_differences(clock.starts[first : first + num_steps + 1]))
        on_gpu = self.llm.device.type == "cuda"
        steps = _steps(batch_size, input_len, context_len, step_s, trace, on_gpu=on_gpu)
        self.results.steps.append(steps)
        self.results.host.extend(_host(batch_size, input_len, clock.steps[timed]))
        floors = self._decode_floors(batch_size, context_len)
        self._add_kernels(case, trace.steps[NUM_SETTLING_STEPS:], num_steps, floors)

    def _watch_decode(self, prompts: Prompts, first: int, num_steps: int) -> tuple[StepClock, profile]:
        """The batch three times: to warm up, under the clock, under the profiler from step first on."""
        llm, params = self.llm, fixed_length(first + num_steps + 1)
        clock, profiler = StepClock(), new_profiler(llm.device)
        recorder = StepRecorder(profiler, first - NUM_SETTLING_STEPS, NUM_SETTLING_STEPS + num_steps)
        llm.generate(prompts, params)
        for watch in (clock, recorder):
            with llm.watch_steps(watch):
                llm.generate(prompts, params)
        return clock, profiler

    def prefill(self, input_len: int) -> None:
        """The first tokens of requests that come one after another."""
        llm, workload = self.llm, self.workload
        prompts = random_prompts(1, input_len, llm.spec.vocab_size)
        for _ in range(workload.num_iters_warmup):
            _first_token(llm, prompts)
        profiler = new_profiler(llm.device)
        with profiler if llm.is_root else nullcontext(), llm.watch_steps(record_function):
            for _ in range(workload.num_iters):
                _first_token(llm, prompts)
        if not llm.is_root:
            return
        case = f"prefill-1x{input_len}"
        trace = read_recording(profiler, self.trace_dir, case)
        num_steps = -(-input_len // llm.config.max_num_batched_tokens)
        found = [_prompt_steps(trace, span, num_steps) for span in trace.ranges[FIRST_TOKEN]]
        self.results.prompts.append(_prompt(input_len, trace.ranges[FIRST_TOKEN], found))
        floors = self._prefill_floors(input_len) if num_steps == 1 else {}
        self._add_kernels(case, [step for steps in found for step in steps], len(found), floors)

    def _add_kernels(self, case: str, steps: Sequence[Step], num_steps: int, floors: OperationFloors) -> None:
        linears = stage_linears(self.llm.spec, self.llm.layout)
        self.results.kernel_times.extend(kernel_times(case, steps, num_steps, linears, floors))

    def _decode_floors(self, batch_size: int, context_len: float) -> OperationFloors:
        rows = -(-batch_size // self.llm.layout.pp_size)
        return floors_s(self._cases().decode(rows, round(context_len)), self.floors.ceilings)

    def _prefill_floors(self, num_tokens: int) -> OperationFloors:
        """What runs for the last token alone is that of a decode step."""
        cases = self._cases()
        return floors_s([*cases.decode(1, num_tokens), *cases.prefill(num_tokens)], self.floors.ceilings)

    def _cases(self) -> StepCases:
        llm = self.llm
        return StepCases(llm.spec, llm.layout.tp_size, llm.dtype, llm.device)


def kernel_times(
    case: str, steps: Sequence[Step], num_steps: int, linears: Sequence[str], floors: OperationFloors
) -> list[KernelTime]:
    """The kernels of all steps, each per step of num_steps; those that take longest first."""
    calls: dict[tuple[str, str], list[float]] = defaultdict(list)
    for step in steps:
        names = [work.name for work in step]
        for work, operation in zip(step, operations(names, linears), strict=True):
            calls[short_name(work.name), operation].append(work.own_us / 1e6)
    total = sum(map(sum, calls.values()))
    times = []
    for (kernel, operation), own in calls.items():
        per_step, floor = sum(own) / num_steps, floors.get(operation)
        floor = None if floor is None else floor * len(own) / num_steps
        percent = None if floor is None or not per_step else 100 * floor / per_step
        share = 100 * sum(own) / total
        times.append(
            KernelTime(case, kernel, operation, len(own) / num_steps, per_step, share, floor, percent)
        )
    return sorted(times, key=lambda time: -time.s_per_step)


def _first_token(llm: LLM, prompts: Prompts) -> None:
    increments = llm.stream(prompts, fixed_length(NUM_FIRST_TOKENS))
    with record_function(FIRST_TOKEN):
        next(increments, None)
    for _ in increments:
        pass


def _steps(
    batch_size: int, input_len: int, context_len: float, step_s: Summary, trace: Trace, *, on_gpu: bool
) -> StepsResult:
    steps = [step for step in trace.steps[NUM_SETTLING_STEPS:] if step]  # a stage may have nothing to do
    assert steps, "the profiler saw nothing that a step launched"
    starts = [span.start for span in trace.ranges[PARTS[0]][NUM_SETTLING_STEPS - 1 :]]
    gaps = step_gaps(steps) if on_gpu else []
    return StepsResult(
        batch_size,
        input_len,
        context_len,
        step_s,
        recorded_step_s=_seconds(_differences(starts)),
        busy_s=_seconds([_busy_us(step) for step in steps]),
        gap_s=_seconds([gap.length for gap in gaps]) if gaps else None,
        idle_s=_seconds([idle_us(gap, steps) for gap in gaps]) if gaps else None,
    )


def _host(batch_size: int, input_len: int, steps: Sequence[dict[str, float]]) -> list[HostTime]:
    times = {part: [step[part] for step in steps] for part in PARTS}
    times[COORDINATOR] = [sum(step.values()) - step["wait"] for step in steps]
    return [HostTime(batch_size, input_len, part, summarize(each)) for part, each in times.items()]


def _prompt_steps(trace: Trace, span: Span, num_steps: int) -> list[Step]:
    """The steps of one prompt: the first ones within the time of its first token."""
    launches = zip(trace.ranges[LAUNCH], trace.steps, strict=True)
    return [step for launch, step in launches if span.start <= launch.start < span.end][:num_steps]


def _prompt(input_len: int, spans: Sequence[Span], prompts: Sequence[Sequence[Step]]) -> PromptResult:
    works = [[work for step in steps for work in step] for steps in prompts]
    device = [Span(min(w.span.start for w in each), max(w.span.end for w in each)) for each in works]
    return PromptResult(
        input_len,
        ttft_s=_seconds([span.length for span in spans]),
        before_s=_seconds([inner.start - outer.start for outer, inner in zip(spans, device, strict=True)]),
        device_s=_seconds([span.length for span in device]),
        busy_s=_seconds([_busy_us(each) for each in works]),
        after_s=_seconds([outer.end - inner.end for outer, inner in zip(spans, device, strict=True)]),
    )


def _busy_us(step: Step) -> float:
    return sum(work.own_us for work in step)


def _differences(times: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def _seconds(values_us: Sequence[float]) -> Summary:
    return summarize([value / 1e6 for value in values_us])
