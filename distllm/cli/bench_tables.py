"""The tables of `distllm bench`: each kind of result as rows, in the units that people quote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from distllm.cli.tables import print_table

if TYPE_CHECKING:
    from distllm.ops.bench.comm import CommResult
    from distllm.ops.bench.floors import Ceilings
    from distllm.ops.bench.kernels import KernelResult
    from distllm.ops.bench.latency import DecodeResult, FirstTokenResult
    from distllm.ops.bench.profile import HostTime, KernelTime, PromptResult, StepsResult
    from distllm.ops.bench.report import Report
    from distllm.ops.bench.throughput import ThroughputResult
    from distllm.ops.bench.timing import Summary

Row = Sequence[object]


def print_report(report: Report) -> None:
    """What it ran on, then a table for each kind of result."""
    facts = report.environment
    device = f"{facts['gpus']} × {facts['gpu']}" if facts["gpu"] else facts["cpu"]
    click.echo(f"{report.num_ranks} rank(s), {device}, torch {facts['torch']}, distllm {facts['distllm']}")
    if report.ceilings:
        click.echo(ceilings_line(report.ceilings))
    if report.ready_s:
        click.echo(f"engine ready after {number(report.ready_s)} s")
    for kind, results in report.results.items():
        for title, header, row in TABLES[kind]:
            print_table(title, header, [row(result) for result in results])


def ceilings_line(ceilings: Ceilings) -> str:
    reading, arithmetic = ceilings.read_bytes_per_s / 1e9, ceilings.flop_per_s / 1e12
    return f"measured ceilings: reading {number(reading)} GB/s, matrix product {number(arithmetic)} TFLOP/s"


def decode_row(result: DecodeResult) -> Row:
    shape = (result.batch_size, result.input_len, f"{result.context_len:g}")
    times = (ms(result.step_s.median), ms(result.step_s.p90), ms(result.floor_s))
    return (*shape, *times, percent(result.floor_percent))


def gaps_row(result: DecodeResult) -> Row:
    gaps = result.itl_s
    return (result.batch_size, result.input_len, ms(gaps.median), ms(gaps.p90), ms(gaps.p99))


def first_token_row(result: FirstTokenResult) -> Row:
    ttft = result.ttft_s
    return (
        result.input_len,
        ms(ttft.median),
        ms(ttft.p90),
        ms(result.floor_s),
        percent(result.floor_percent),
    )


def throughput_row(result: ThroughputResult) -> Row:
    shape = (result.num_prompts, result.input_len, result.output_len)
    rates = (result.requests_per_s, result.output_tokens_per_s, result.total_tokens_per_s)
    ceiling = (f"{result.ceiling_output_tokens_per_s:,.1f}", percent(result.ceiling_percent))
    return (*shape, *(f"{rate:,.1f}" for rate in rates), *ceiling)


def comm_row(result: CommResult) -> Row:
    rates = (number(result.bytes_per_s / 1e9), number(result.bus_bytes_per_s / 1e9))
    return (result.operation, result.num_bytes, us(result.time_s.median), us(result.time_s.p90), *rates)


def kernel_row(result: KernelResult) -> Row:
    flop = number(result.flop_per_s / 1e12) if result.flop_per_s else ""
    rates = (number(result.bytes_per_s / 1e9), flop, percent(result.ceiling_percent))
    return (result.operation, result.shape, us(result.time_s.median), us(result.floor_s), *rates)


def steps_row(result: StepsResult) -> Row:
    steps = (us(result.step_s.median), us(result.recorded_step_s.median), us(result.busy_s.median))
    return (result.batch_size, result.input_len, *steps, *spread(result.gap_s), *spread(result.idle_s))


def host_row(result: HostTime) -> Row:
    return (result.batch_size, result.input_len, result.part, *spread(result.time_s))


def prompt_row(result: PromptResult) -> Row:
    times = (result.ttft_s, result.before_s, result.device_s, result.busy_s, result.after_s)
    return (result.input_len, *(us(time.median) for time in times))


def kernel_time_row(result: KernelTime) -> Row:
    calls = (f"{result.calls_per_step:g}", us(result.s_per_step / result.calls_per_step))
    step = (us(result.s_per_step), percent(result.share_percent))
    floor = (us(result.floor_s), percent(result.floor_percent or 0)) if result.floor_s else ("", "")
    return (result.case, result.kernel, result.operation, *calls, *step, *floor)


def spread(summary: Summary | None) -> Row:
    """Median, p90 and the most, in µs."""
    return (us(summary.median), us(summary.p90), us(max(summary.raw))) if summary else ("", "", "")


def ms(seconds: float) -> str:
    return number(seconds * 1e3)


def us(seconds: float) -> str:
    return number(seconds * 1e6)


def number(value: float) -> str:
    """Four digits, and never an exponent where a reader compares columns."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def percent(value: float) -> str:
    return f"{value:.1f} %"


Table = tuple[str, tuple[str, ...], Callable[[Any], Row]]

TABLES: dict[str, list[Table]] = {
    "decode": [
        (
            "Decode, ms per step",
            ("batch", "prompt", "context", "step", "p90", "floor", "of it"),
            decode_row,
        ),
        ("Gaps between tokens (ITL), ms", ("batch", "prompt", "median", "p90", "p99"), gaps_row),
    ],
    "first_token": [
        (
            "Time to the first token, ms",
            ("prompt", "TTFT", "p90", "floor", "of it"),
            first_token_row,
        )
    ],
    "throughput": [
        (
            "Throughput, all requests at once, per second",
            ("requests", "prompt", "output", "requests", "output tok", "all tok", "ceiling", "of it"),
            throughput_row,
        )
    ],
    "steps": [
        (
            "Consecutive decode steps, µs",
            ("batch", "prompt", "step", "recorded", "busy", "gap", "p90", "max", "idle gap", "p90", "max"),
            steps_row,
        )
    ],
    "host": [
        (
            "Host of rank 0 in these steps, nothing recorded, µs (coordinator: all but wait)",
            ("batch", "prompt", "part", "median", "p90", "max"),
            host_row,
        )
    ],
    "prompts": [
        (
            "First token while recording, µs",
            ("prompt", "TTFT", "before the first kernel", "first to last", "busy", "after the last"),
            prompt_row,
        )
    ],
    "kernel_times": [
        (
            "Kernels, µs",
            ("case", "kernel", "operation", "calls", "a call", "a step", "share", "floor", "of it"),
            kernel_time_row,
        )
    ],
    "comm": [
        (
            "Messages (send_recv: half a round trip)",
            ("operation", "bytes", "µs", "p90", "GB/s", "bus GB/s"),
            comm_row,
        )
    ],
    "kernels": [
        (
            "Kernels",
            ("operation", "shape", "µs", "floor", "GB/s", "TFLOP/s", "of ceiling"),
            kernel_row,
        )
    ],
}
