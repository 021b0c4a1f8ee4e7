"""`distllm bench`: measure the engine, its communicators or its kernels, beside what the hardware allows.

Every rank measures; rank 0 prints the tables and writes the file.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distllm import env
from distllm.cli.bench_tables import print_report
from distllm.cli.options import dtype as dtype_option
from distllm.cli.options import engine_options, tensor_parallel
from distllm.config import LOAD_FORMATS
from distllm.errors import LaunchError
from distllm.ops.bench import workloads

if TYPE_CHECKING:
    from distllm.ops.bench.report import Report

Command = Callable[..., Any]
COUNT = click.IntRange(min=1)


def count_option(name: str, default: int | tuple[int, ...], text: str) -> Callable[[Command], Command]:
    """A positive number, or with a tuple as default one or more of them."""
    several = isinstance(default, tuple)
    return click.option(
        name,
        type=COUNT,
        default=default,
        multiple=several,
        show_default=True,
        help=text + " Repeatable." * several,
    )


def workload_option(named: dict[str, workloads.Options]) -> Callable[[Command], Command]:
    """--workload NAME puts its values where defaults stand: what the command line says still counts."""

    def choose(context: click.Context, _option: click.Parameter, name: str | None) -> None:
        context.default_map = named[name] if name else {}

    return click.option(
        "--workload",
        type=click.Choice(list(named)),
        is_eager=True,
        expose_value=False,
        callback=choose,
        help="Model, layout and lengths by name; MODEL may be left out. Other options override it.",
    )


def check_folder(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """Before anything runs: a result that cannot be written is minutes lost."""
    if path and not path.parent.is_dir():
        raise click.BadParameter(f"the folder {path.parent} does not exist; make it first")
    return path


load_format_option = click.option(
    "--load-format",
    type=click.Choice(LOAD_FORMATS),
    default="auto",
    show_default=True,
    help="dummy: random weights from config.json alone.",
)
output_option = click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=check_folder,
    help="Write a JSON file with everything that was measured.",
)


def command_line() -> str:
    return shlex.join(["distllm", *sys.argv[1:]])


def check_alone() -> None:
    identity = env.launcher_identity()
    if identity and (identity.size or 1) > 1:
        raise LaunchError(
            f"bench kernels measures one device, and {identity.size} ranks were started; start it without "
            f"{identity.launcher}"
        )


def show(report: Report, output: Path | None) -> None:
    print_report(report)
    if output:
        report.write(output)
        click.echo(f"\nwrote {output}")


@click.group()
def bench() -> None:
    """Measure speed, and compare it with what this hardware allows."""


@bench.command()
@click.argument("model")
@workload_option(workloads.LATENCY)
@count_option("--input-len", (128,), "Tokens of a prompt.")
@count_option("--output-len", 128, "Decode steps that are timed.")
@count_option("--batch-size", (1,), "Sequences that decode together.")
@count_option("--num-iters", 5, "Measurements of each figure.")
@click.option(
    "--num-iters-warmup", type=click.IntRange(min=0), default=2, show_default=True, help="Before them."
)
@engine_options
@load_format_option
@output_option
def latency(
    model: str,
    input_len: tuple[int, ...],
    output_len: int,
    batch_size: tuple[int, ...],
    num_iters: int,
    num_iters_warmup: int,
    output: Path | None,
    **options: Any,
) -> None:
    """Time per decode step, gaps between tokens, time to the first token."""
    start = time.perf_counter()  # what is imported now is part of the way to an engine that is ready
    from distllm.ops.bench.engine import measure_floors, open_engine
    from distllm.ops.bench.latency import LatencyWorkload, run_decode, run_first_token
    from distllm.ops.bench.report import engine_report

    workload = LatencyWorkload(input_len, output_len, batch_size, num_iters, num_iters_warmup)
    workload.check_batch_sizes(options["max_num_seqs"])
    with open_engine(model, workload.max_seq_len(options["max_num_batched_tokens"]), options) as llm:
        ready_s = time.perf_counter() - start
        floors = measure_floors(llm)
        results: dict[str, Sequence[Any]] = {
            "decode": run_decode(llm, workload, floors),
            "first_token": run_first_token(llm, workload, floors),
        }
        if llm.is_root:
            report = engine_report("latency", command_line(), llm, ready_s, workload, floors, results)
            show(report, output)


@bench.command()
@click.argument("model")
@workload_option(workloads.LATENCY)
@click.option(
    "--phase",
    type=click.Choice(("decode", "prefill")),
    default=("decode",),
    multiple=True,
    show_default=True,
    help="prefill: the first token of one request. Repeatable.",
)
@count_option("--input-len", (128,), "Tokens of a prompt.")
@count_option("--batch-size", (1, 256), "Sequences that decode together.")
@count_option("--num-steps", 20, "Decode steps that are recorded.")
@click.option(
    "--trace",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    help="A folder for a Chrome trace of each case (*.json.gz).",
)
@engine_options
@load_format_option
@output_option
def profile(
    model: str,
    phase: tuple[str, ...],
    input_len: tuple[int, ...],
    batch_size: tuple[int, ...],
    num_steps: int,
    trace: Path | None,
    output: Path | None,
    **options: Any,
) -> None:
    """Consecutive steps: gaps between them, the host's time, each kernel beside its floor."""
    start = time.perf_counter()  # what is imported now is part of the way to an engine that is ready
    from distllm.ops.bench.engine import measure_floors, open_engine
    from distllm.ops.bench.latency import LatencyWorkload
    from distllm.ops.bench.profile import run_profile
    from distllm.ops.bench.report import engine_report

    workload = LatencyWorkload(input_len, num_steps, batch_size)
    workload.check_batch_sizes(options["max_num_seqs"])
    with open_engine(model, workload.max_seq_len(options["max_num_batched_tokens"]), options) as llm:
        ready_s = time.perf_counter() - start
        floors = measure_floors(llm)
        results = run_profile(llm, workload, phase, floors, trace)
        if llm.is_root:
            report = engine_report("profile", command_line(), llm, ready_s, workload, floors, vars(results))
            show(report, output)


@bench.command()
@click.argument("model")
@workload_option(workloads.THROUGHPUT)
@count_option("--num-prompts", 256, "Requests, all sent at once.")
@count_option("--input-len", 512, "Tokens of each prompt.")
@count_option("--output-len", 256, "Tokens generated for each.")
@count_option("--num-iters", 3, "Runs; the median counts.")
@engine_options
@load_format_option
@output_option
def throughput(
    model: str,
    num_prompts: int,
    input_len: int,
    output_len: int,
    num_iters: int,
    output: Path | None,
    **options: Any,
) -> None:
    """Requests and tokens per second, offline."""
    start = time.perf_counter()  # what is imported now is part of the way to an engine that is ready
    from distllm.ops.bench.engine import measure_floors, open_engine
    from distllm.ops.bench.report import engine_report
    from distllm.ops.bench.throughput import ThroughputWorkload, run_throughput

    workload = ThroughputWorkload(num_prompts, input_len, output_len, num_iters)
    with open_engine(model, workload.max_seq_len, options) as llm:
        ready_s = time.perf_counter() - start
        floors = measure_floors(llm)
        results = {"throughput": [run_throughput(llm, workload, floors)]}
        if llm.is_root:
            report = engine_report("throughput", command_line(), llm, ready_s, workload, floors, results)
            show(report, output)


@bench.command()
@click.option(
    "--max-bytes", type=click.IntRange(min=4), default=2**24, show_default=True, help="The largest message."
)
@output_option
def comm(max_bytes: int, output: Path | None) -> None:
    """all_reduce and send/recv over all ranks of the job, by size."""
    from distllm.comm.connect import open_control
    from distllm.ops.bench.comm import run_comm
    from distllm.ops.bench.report import Report

    control = open_control()
    results = run_comm(control, max_bytes)
    if control.rank == 0:
        report = Report(
            "comm", command_line(), control.size, {"max_bytes": max_bytes}, None, {"comm": results}
        )
        show(report, output)
    control.close()


@bench.command()
@click.argument("model")
@tensor_parallel
@dtype_option
@count_option("--batch-size", (1, 32, 256), "Sequences of a decode step.")
@count_option("--context-len", 1024, "Tokens of each of them.")
@count_option("--input-len", (1024,), "Tokens of a prompt.")
@output_option
def kernels(
    model: str,
    tensor_parallel_size: int,
    dtype: str,
    batch_size: tuple[int, ...],
    context_len: int,
    input_len: tuple[int, ...],
    output: Path | None,
) -> None:
    """Each operation of a step, at the shapes of one of -tp ranks. One process; reads no weights."""
    check_alone()
    from distllm.ops.bench.kernels import run_kernels
    from distllm.ops.bench.report import Report

    ceilings, results = run_kernels(model, tensor_parallel_size, dtype, batch_size, context_len, input_len)
    options = {
        "model": model,
        "tensor_parallel_size": tensor_parallel_size,
        "dtype": dtype,
        "batch_size": batch_size,
        "context_len": context_len,
        "input_len": input_len,
    }
    report = Report("kernels", command_line(), 1, options, ceilings, {"kernels": results})
    show(report, output)
