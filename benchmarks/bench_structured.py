"""What structured outputs cost: ms between decode steps of a batch that has them, beside one that has none.

    python benchmarks/bench_structured.py benchmarks/shapes/llama-8b --batch-size 64 -o structured.json
    mpirun -n 2 python benchmarks/bench_structured.py benchmarks/shapes/llama-8b -tp 2

Random weights, with the vocabulary of bench_masks.py as their tokenizer. Finding masks takes threads on rank
0 (bench_masks.py says how long); here is what of it can be seen from outside.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from bench_masks import EOS, FORMS, VOCAB_SIZE, Vocabulary
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from distllm import LLM, SamplingParams, StructuredOutputsParams
from distllm.cli.bench import count_option, output_option
from distllm.cli.bench_tables import ms
from distllm.cli.options import tensor_parallel
from distllm.cli.tables import print_table
from distllm.errors import UserError
from distllm.ops.bench.report import Report
from distllm.ops.bench.timing import Summary, summarize

INPUT_LEN, NUM_UNSTEADY = 16, 10  # tokens of a prompt; steps at the beginning that are not counted


@dataclass(frozen=True)
class Result:
    form: str
    step_s: Summary  # time between the launches of steps
    of_plain: float  # medians


def make_folder(folder: Path, shape: Path) -> None:
    """The shape's config.json with the vocabulary of bench_masks, and a tokenizer.json that spells it."""
    config = json.loads((shape / "config.json").read_text())
    config |= {"vocab_size": VOCAB_SIZE, "eos_token_id": EOS}
    (folder / "config.json").write_text(json.dumps(config))
    letters = byte_letters()
    vocabulary = Vocabulary()
    tokens = {"".join(letters[b] for b in vocabulary.token_bytes(n)): n for n in range(EOS)}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))


def byte_letters() -> dict[int, str]:
    """How byte-level BPE writes each byte (Radford et al. 2019): printable ones as they are."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


class Launches:
    """When steps were launched: for LLM.watch_steps."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if part == "launch":
            self.times.append(time.perf_counter())
        yield


def gaps(llm: LLM, batch_size: int, num_steps: int, form: StructuredOutputsParams | None) -> list[float]:
    """Seconds between steps of the full batch; on rank 0."""
    launches, prompts = Launches(), [[5 + row] * INPUT_LEN for row in range(batch_size)]
    params = SamplingParams(
        seed=1, max_tokens=num_steps, min_tokens=num_steps, detokenize=False, structured_outputs=form
    )
    with llm.watch_steps(launches):
        llm.generate(prompts, params)
    return [end - start for start, end in pairwise(launches.times[NUM_UNSTEADY:])]


def measure(llm: LLM, batch_size: int, num_steps: int, num_iters: int) -> list[Result]:
    """Collective."""
    forms = {"none": None} | {name: StructuredOutputsParams(**form) for name, form in FORMS.items()}
    turns = [
        {name: gaps(llm, batch_size, num_steps, form) for name, form in forms.items()}
        for _ in range(1 + num_iters)
    ]
    if not llm.is_root:
        return []
    steps = {name: summarize([gap for turn in turns[1:] for gap in turn[name]]) for name in forms}
    return [Result(name, step, step.median / steps["none"].median) for name, step in steps.items()]


@click.command()
@click.argument("shape", type=click.Path(file_okay=False, exists=True, path_type=Path))
@tensor_parallel
@count_option("--batch-size", 64, "Sequences that decode together.")
@count_option("--num-steps", 96, "Tokens of each.")
@count_option("--num-iters", 2, "Turns that count.")
@output_option
def main(
    shape: Path, batch_size: int, num_steps: int, num_iters: int, output: Path | None, **options: Any
) -> None:
    """Measure every form and print a table."""
    options |= {"load_format": "dummy", "max_num_seqs": batch_size, "max_model_len": 1024}
    with TemporaryDirectory() as folder:
        make_folder(Path(folder), shape)
        try:
            llm = LLM(folder, enable_prefix_caching=False, **options)
        except UserError as error:
            raise click.ClickException(str(error)) from None
        with llm:
            results = measure(llm, batch_size, num_steps, num_iters)
    if llm.is_root:
        rows = [(r.form, ms(r.step_s.median), ms(r.step_s.p90), f"{r.of_plain:.3f} ×") for r in results]
        print_table(f"Batch {batch_size}, ms between steps", ["form", "median", "p90", "of none"], rows)
    if llm.is_root and output:
        command, facts = shlex.join(["python", *sys.argv]), {"engine": asdict(llm.config), "forms": FORMS}
        Report("structured", command, llm.layout.world_size, facts, None, {"forms": results}).write(output)


if __name__ == "__main__":
    main()
