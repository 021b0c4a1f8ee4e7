"""Steps out of a profiler's events: made-up ones whose answers are known, random ones against counting."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from distllm.ops.bench.operations import operations
from distllm.ops.bench.trace import Span, Work, idle_us, own_us, read_trace, short_name, step_gaps, step_span

CPU, CUDA = DeviceType.CPU, DeviceType.CUDA


def event(name: str, start: float, end: float, number: int = 0, on: DeviceType = CPU, **more: Any) -> Any:
    """As much of a FunctionEvent as is read."""
    what = {"is_user_annotation": False, "cpu_parent": None} | more
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=span, id=number, device_type=on, **what)


def kernel(name: str, start: float, end: float, number: int) -> Any:
    return event(name, start, end, number, CUDA)


# Two steps: a graph of two kernels, the second started early, between two copies; then a graph alone.
EVENTS = [
    event("launch", 0, 10, 1, is_user_annotation=True),
    event("launch", 0, 118, 1, CUDA, is_user_annotation=True),  # as the GPU's timeline repeats it
    event("cudaStreamIsCapturing", 0.5, 0.6, 1),  # the number of a call, which is also that of the range
    event("cudaMemcpyAsync", 1, 2, 7),
    event("cudaGraphLaunch", 3, 6, 8),
    event("cudaMemcpyAsync", 7, 8, 9),
    event("launch", 20, 30, 10, is_user_annotation=True),
    event("cudaGraphLaunch", 21, 24, 11),
    event("aten::copy_", 26, 27, 9),  # the number of an operation, which is also that of a call
    event("cudaLaunchKernel", 40, 41, 12),  # outside of any step
    kernel("before the recording", -5, 20, 3),
    kernel("Memcpy HtoD (Pinned -> Device)", 20, 22, 7),
    kernel("a", 30, 70, 8),
    kernel("b", 60, 100, 8),
    kernel("Memcpy DtoH (Device -> Pinned)", 104, 106, 9),
    kernel("a", 112, 140, 11),
    kernel("b", 140, 180, 11),
    kernel("of nobody", 190, 200, 12),
]


def test_steps_on_a_gpu() -> None:
    events = EVENTS.copy()
    random.Random(0).shuffle(events)
    trace = read_trace(events, "launch")
    assert sorted(trace.ranges["launch"]) == [(0, 10), (20, 30)]
    first, second = trace.steps
    assert [work.name[:8] for work in first] == ["Memcpy H", "a", "b", "Memcpy D"]
    assert [work.own_us for work in first] == [2, 40, 30, 2]
    assert [work.in_graph for work in first] == [False, True, True, False]
    assert [work.span for work in second] == [(112, 140), (140, 180)]
    assert (step_span(first), step_span(second)) == ((30, 100), (112, 180))
    (gap,) = step_gaps(trace.steps)
    assert gap == (100, 112) and idle_us(gap, trace.steps) == 10


def test_a_step_without_a_graph_is_all_that_it_started() -> None:
    step = [Work("copy", Span(1, 2), 1), Work("b", Span(4, 9), 5), Work("c", Span(5, 7), 0)]
    assert step_span(step) == (1, 9)


def test_operations_on_a_cpu() -> None:
    """A real recording: what the range calls counts, not what is called in turn, nor what is outside."""
    x = torch.randn(30, 30)
    with profile(activities=[ProfilerActivity.CPU]) as recording:
        x @ x
        for _ in range(2):
            with record_function("launch"):
                torch.nn.functional.linear(x, x).add_(1)
    trace = read_trace(recording.events(), "launch")
    assert [[work.name for work in step] for step in trace.steps] == [["aten::linear", "aten::add_"]] * 2
    for launch, step in zip(trace.ranges["launch"], trace.steps, strict=True):
        assert 0 < sum(work.own_us for work in step) <= launch.length


@pytest.mark.parametrize("seed", range(20))
def test_own_times_add_up_to_the_time_in_which_anything_runs(seed: int) -> None:
    rng = random.Random(seed)
    starts = sorted(rng.randrange(100) for _ in range(rng.randint(1, 30)))
    spans = [Span(start, start + rng.randrange(10)) for start in starts]
    covered = {moment for span in spans for moment in range(int(span.start), int(span.end))}
    assert sum(own_us(spans)) == len(covered)
    gap = Span(20, 50)
    steps = [[Work("", span, 0) for span in spans[::2]], [Work("", span, 0) for span in spans[1::2]]]
    assert idle_us(gap, steps) == len(set(range(20, 50)) - covered)


NAMES = {
    "_gemv_kernel": "_gemv_kernel",
    "nvjet_sm90_tst_128x64_64x8_2x1_v_bz_TNN": "nvjet_sm90_tst_128x64_64x8_2x1_v_bz_TNN",
    "Memcpy DtoH (Device -> Pinned)": "Memcpy DtoH",
    "void all_reduce_add_norm<BFloat16, 1, (Mode)0>(const uint4*, float)": "all_reduce_add_norm",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>(cublasLt::Params)": "splitKreduce_kernel",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>, std::array<char*, 1> >"
    "(int, at::native::FillFunctor<int>)": "vectorized_elementwise_kernel (FillFunctor)",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::Iterator&)"
    "::{lambda()#3}>(int)": "unrolled_elementwise_kernel (direct_copy_kernel_cuda)",
    "void (anonymous namespace)::softmax_warp_forward<float, 7>(float*)": "softmax_warp_forward",
    "aten::linear": "aten::linear",
}


@pytest.mark.parametrize("name", NAMES)
def test_short_names(name: str) -> None:
    assert short_name(name) == NAMES[name]


def test_linears_are_told_apart_by_their_order() -> None:
    layer = ["_gemv_kernel", "_decode_kernel", "_gemv_kernel", "splitKreduce_kernel", "nvjet_sm90_tst"]
    linears = ["attn.qkv", "attn.o", "mlp.up"] * 2 + ["head"]
    found = operations([*layer, *layer, "void cutlass::Kernel2<int>", "elementwise_kernel"], linears)
    attn = ["linear attn.qkv", "paged_attention", "linear attn.o", "", "linear mlp.up"]
    assert found == [*attn, *attn, "linear head", ""]
    assert operations(layer, linears) == ["linear", "paged_attention", "linear", "", "linear"]
