"""What each piece of the engine is worth: ms per decode step as they are put in, one after another.

    python benchmarks/ablation.py benchmarks/shapes/llama-8b -o ablation.json
    mpirun -n 2 python benchmarks/ablation.py benchmarks/shapes/llama-8b -tp 2

Each rung is an engine of its own with random weights, in which the pieces above it are taken out at run time:
the product has no options for that. Steps are measured as by `bench latency`.
"""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch

from distllm import kernels
from distllm.cli.bench import count_option, output_option
from distllm.cli.bench_tables import ms, percent
from distllm.cli.options import tensor_parallel
from distllm.cli.tables import print_table
from distllm.config import EngineConfig
from distllm.env import launcher_identity
from distllm.errors import UserError
from distllm.ops.bench.engine import measure_floors, open_engine
from distllm.ops.bench.latency import DecodeResult, LatencyWorkload, run_decode
from distllm.ops.bench.report import Report
from distllm.runtime.model_runner import ModelRunner

ONE_SHOT = "one-shot all-reduce"
UNFUSED = ("linear", "norm", "activation", "rope")  # modules of kernels whose torch reference takes over


@dataclass(frozen=True)
class Rung:
    piece: str  # that was put in
    gain_percent: float  # of the time of the rung before
    decode: DecodeResult


def no_graphs() -> AbstractContextManager[Any]:
    """As enforce_eager has it."""
    return patch.object(ModelRunner, "capture", lambda *_: None)


def plain_operations() -> AbstractContextManager[Any]:
    """One torch operation after another, where a kernel does several at once."""

    @cache
    def load(module: str, name: str) -> Callable[..., Any]:
        kind = "reference" if module in UNFUSED else "triton"
        return getattr(import_module(f"distllm.kernels.{kind}.{module}"), name)

    return patch.object(kernels, "_triton", load)


def full_launches() -> AbstractContextManager[Any]:
    """A kernel starts when the one before it has ended, not while it drains."""
    return patch.dict("distllm.kernels.triton.launch.OVERLAP", clear=True)


def nccl_alone() -> AbstractContextManager[Any]:
    return patch("distllm.comm.one_shot.try_one_shot", lambda *_: None)


def no_planning_ahead() -> AbstractContextManager[Any]:
    """A step is planned when the one before it has ended."""
    run = ModelRunner.run

    def run_and_wait(runner: ModelRunner, plan: Any) -> None:
        run(runner, plan)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return patch.object(ModelRunner, "run", run_and_wait)


# In the order in which they are put in, with what takes them out.
PIECES = {
    "CUDA graphs": no_graphs,
    "fused kernels": plain_operations,
    "dependent launch": full_launches,
    ONE_SHOT: nccl_alone,
    "planning ahead": no_planning_ahead,
}


def measure(
    missing: Sequence[str], workload: LatencyWorkload, model: str, options: dict[str, Any]
) -> list[DecodeResult]:
    """An engine without these pieces. Collective: every rank."""
    gc.collect()
    torch.cuda.empty_cache()  # the engine before leaves its memory to this one
    with ExitStack() as without:
        for name in missing:
            without.enter_context(PIECES[name]())
        llm = without.enter_context(
            open_engine(model, workload.max_seq_len(EngineConfig.max_num_batched_tokens), options)
        )
        return run_decode(llm, workload, measure_floors(llm))


def climb(workload: LatencyWorkload, model: str, options: dict[str, Any]) -> list[Rung]:
    """Every rung at every batch size. Collective: every rank."""
    has_peers = torch.cuda.is_available() and options["tensor_parallel_size"] > 1
    pieces = [name for name in PIECES if name != ONE_SHOT or has_peers]
    rungs: list[Rung] = []
    before: dict[int, float] = {}
    for number, name in enumerate(["nothing", *pieces]):
        for result in measure(pieces[number:], workload, model, options):
            step_s = result.step_s.median
            gain = 100 * (1 - step_s / before.get(result.batch_size, step_s))
            rungs.append(Rung(name, gain, result))
            before[result.batch_size] = step_s
    return rungs


def row(rung: Rung) -> Sequence[object]:
    result = rung.decode
    times = (ms(result.step_s.median), ms(result.step_s.p90), percent(rung.gain_percent))
    return (result.batch_size, rung.piece, *times, percent(result.floor_percent))


@click.command()
@click.argument("model")
@tensor_parallel
@count_option("--batch-size", (1, 64, 256), "Sequences that decode together.")
@count_option("--num-steps", 64, "Decode steps that are timed.")
@output_option
def main(
    model: str, batch_size: tuple[int, ...], num_steps: int, output: Path | None, **options: Any
) -> None:
    """Measure every rung of the ladder; rank 0 prints it."""
    options |= {"load_format": "dummy", "max_num_seqs": max(batch_size), "max_model_len": None}
    workload = LatencyWorkload((128,), num_steps, batch_size, num_iters=3, num_iters_warmup=1)
    try:
        rungs = climb(workload, model, options)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    identity = launcher_identity()
    if identity and identity.rank:
        return
    header = ("batch", "with", "step", "p90", "gain", "of the floor")
    rungs.sort(key=lambda rung: rung.decode.batch_size)
    print_table("Decode, ms per step", header, [row(rung) for rung in rungs])
    if output:
        command = shlex.join(["python", *sys.argv])
        ranks = options["tensor_parallel_size"]
        facts = {"model": model, **options}
        Report("ablation", command, ranks, facts, None, {"ablation": rungs}).write(output)


if __name__ == "__main__":
    main()
