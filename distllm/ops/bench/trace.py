"""What a profiler recorded, as steps: what each launch started, when that ran, and what lay between.

Reads the events of torch.profiler; knows the names of ranges, but no engine. Times are in µs since the
recording began.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent


class Span(NamedTuple):
    start: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Work:
    """One kernel or copy on a GPU; without one, an operation on the CPU."""

    name: str
    span: Span
    own_us: float  # of it, in which no work that started before was running
    in_graph: bool = False  # launched as a node of a CUDA graph


Step = list[Work]  # by start


@dataclass(frozen=True)
class Trace:
    ranges: dict[str, list[Span]]  # what the host did, by the names of record_function, in order
    steps: list[Step]  # what each launch range started, in their order


class _Started(NamedTuple):
    """What events say of a piece of work."""

    span: Span
    name: str
    in_graph: bool
    moment: float  # when the host started it


def read_trace(events: Iterable[FunctionEvent], launch: str) -> Trace:
    """events: of one recording, in which a range named launch surrounds whatever a step starts."""
    events = sorted(events, key=_span)
    ranges: dict[str, list[Span]] = defaultdict(list)
    for event in events:
        if event.is_user_annotation and event.device_type == DeviceType.CPU:
            ranges[event.name].append(_span(event))
    started = sorted(_gpu_work(events, ranges) or _cpu_work(events, launch))
    return Trace(dict(ranges), _in_steps(started, ranges[launch]))


def _in_steps(started: Sequence[_Started], launches: Sequence[Span]) -> list[Step]:
    starts = [span.start for span in launches]
    steps: list[Step] = [[] for _ in launches]
    for item, own in zip(started, own_us([item.span for item in started]), strict=True):
        index = bisect_right(starts, item.moment) - 1
        if index >= 0 and item.moment < launches[index].end:
            steps[index].append(Work(item.name, item.span, own, item.in_graph))
    return steps


def _gpu_work(events: list[FunctionEvent], annotations: Container[str]) -> list[_Started]:
    """Work on a GPU carries the id of the call that started it, as all nodes of a graph do. Torch counts its
    own operations separately, so only calls into CUDA (cuda…, cu…) are looked at.
    """
    calls = {e.id: e for e in events if e.device_type == DeviceType.CPU and e.name.startswith("cu")}
    found = []
    for event in events:
        if event.device_type != DeviceType.CUDA or event.name in annotations:
            continue
        call = calls.get(event.id)
        if call is not None:  # else it was started before the recording
            found.append(
                _Started(_span(event), event.name, "GraphLaunch" in call.name, call.time_range.start)
            )
    return found


def _cpu_work(events: list[FunctionEvent], launch: str) -> list[_Started]:
    """Operations that the engine called, not those that they called."""
    called = [e for e in events if e.cpu_parent is not None and e.cpu_parent.name == launch]
    return [_Started(_span(event), event.name, False, event.time_range.start) for event in called]


def _span(event: FunctionEvent) -> Span:
    return Span(event.time_range.start, event.time_range.end)


def step_span(step: Step) -> Span:
    """From the first kernel to the end of the last: of the step's graph, if it launched one."""
    spans = [work.span for work in step if work.in_graph] or [work.span for work in step]
    return Span(min(spans).start, max(span.end for span in spans))


def step_gaps(steps: Sequence[Step]) -> list[Span]:
    """Between the spans of neighbouring steps."""
    return [Span(before.end, after.start) for before, after in pairwise(map(step_span, steps))]


def idle_us(gap: Span, steps: Iterable[Step]) -> float:
    """How much of a gap had nothing running at all, copies and small kernels between graphs included."""
    inside = [
        Span(max(work.span.start, gap.start), min(work.span.end, gap.end)) for step in steps for work in step
    ]
    return gap.length - sum(own_us(sorted(span for span in inside if span.length > 0)))


def own_us(spans: Sequence[Span]) -> list[float]:
    """The time that each span adds to those before it; spans by start.

    A kernel under dependent launch starts while the one before it ends. Counted so, no moment counts twice,
    and the sum is the time in which anything ran.
    """
    own, end = [], float("-inf")
    for span in spans:
        own.append(max(0.0, span.end - max(span.start, end)))
        end = max(end, span.end)
    return own


def short_name(name: str) -> str:
    """A C++ kernel without types, arguments and namespaces; where torch names it only in a type, that too."""
    inner = re.search(r"<.*?(\w+(?:Functor|_kernel_cuda|_kernel_impl))", name)
    plain = name.replace("(anonymous namespace)::", "").replace("void ", "")
    plain = re.split(r"[<(]", plain, maxsplit=1)[0].strip()
    plain = plain if plain.startswith("aten::") else plain.rsplit("::", 1)[-1]
    return f"{plain} ({inner[1]})" if inner else plain
