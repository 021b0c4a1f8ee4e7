"""What sampling costs: ms per decode step of a batch for each way to choose a token, beside greedy.

    python benchmarks/bench_sampling.py benchmarks/shapes/llama-8b --batch-size 256 -o sampling.json
    mpirun -n 2 python benchmarks/bench_sampling.py benchmarks/shapes/llama-8b -tp 2

Random weights. A step is the difference of two generate() calls, as in `bench latency`; greedy runs first and
last, and the ways in between take turns, so that a GPU that slows down meanwhile shows.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from distllm import LLM, SamplingParams
from distllm.cli.bench import count_option, output_option
from distllm.cli.bench_tables import ms
from distllm.cli.options import tensor_parallel
from distllm.cli.tables import print_table
from distllm.errors import UserError
from distllm.ops.bench.latency import fixed_length, random_prompts
from distllm.ops.bench.report import Report
from distllm.ops.bench.timing import Summary, summarize

INPUT_LEN, RAMP = 128, 32  # tokens of a prompt; of the shorter call, in which prompts are computed
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {},
    "top-k, top-p": {"top_k": 50, "top_p": 0.9},
    "min-p": {"min_p": 0.05},
    "typical": {"typical_p": 0.9},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "bias, n-grams": {"logit_bias": dict.fromkeys(range(300), 1.0), "no_repeat_ngram_size": 3},
    "logprobs": {"temperature": 0, "logprobs": 5},
    "greedy again": {"temperature": 0},
}


@dataclass(frozen=True)
class Result:
    way: str
    step_s: Summary
    of_greedy: float  # medians


def step_s(llm: LLM, prompts: list[list[int]], params: SamplingParams, num_steps: int) -> float:
    def generate_s(num_tokens: int) -> float:
        start = time.perf_counter()
        llm.generate(prompts, replace(params, max_tokens=num_tokens))
        return time.perf_counter() - start

    return (generate_s(RAMP + num_steps) - generate_s(RAMP)) / num_steps


def measure(llm: LLM, batch_size: int, num_steps: int, num_iters: int) -> list[Result]:
    """Collective: every rank of the engine."""
    prompts = random_prompts(batch_size, INPUT_LEN, llm.spec.vocab_size)
    params = {way: replace(fixed_length(1), **{"temperature": 1.0, **fields}) for way, fields in WAYS.items()}
    turns = [
        {way: step_s(llm, prompts, each, num_steps) for way, each in params.items()}
        for _ in range(1 + num_iters)
    ]
    steps = {way: summarize([turn[way] for turn in turns[1:]]) for way in WAYS}  # the first warms up
    return [Result(way, step, step.median / steps["greedy"].median) for way, step in steps.items()]


def row(result: Result) -> Sequence[str]:
    step = result.step_s
    return result.way, ms(step.median), ms(step.lowest), f"{result.of_greedy:.3f} ×"


@click.command()
@click.argument("model")
@tensor_parallel
@count_option("--batch-size", 256, "Sequences that decode together.")
@count_option("--max-model-len", 4096, "What the tables of tokens have room for.")
@count_option("--num-steps", 64, "Decode steps that are timed.")
@count_option("--num-iters", 3, "Turns that count.")
@output_option
def main(
    model: str, batch_size: int, num_steps: int, num_iters: int, output: Path | None, **options: Any
) -> None:
    """Measure every way and print a table."""
    options |= {"load_format": "dummy", "max_num_seqs": batch_size, "enable_prefix_caching": False}
    try:
        llm = LLM(model, **options)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    with llm:
        results = measure(llm, batch_size, num_steps, num_iters)
        if llm.is_root:
            header = ("way", "step", "lowest", "of greedy")
            print_table(f"Batch {batch_size}, ms per step", header, [row(result) for result in results])
        if llm.is_root and output:
            command, facts = shlex.join(["python", *sys.argv]), {"engine": asdict(llm.config), "ways": WAYS}
            Report("sampling", command, llm.layout.world_size, facts, None, {"ways": results}).write(output)


if __name__ == "__main__":
    main()
