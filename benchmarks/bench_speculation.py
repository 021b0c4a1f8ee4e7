"""What speculation gains: tokens a second with drafts beside those without, by size of batch.

    python benchmarks/bench_speculation.py /scratch/pair benchmarks/shapes/llama-8b -o speculation.json
    mpirun -n 2 python benchmarks/bench_speculation.py /scratch/pair benchmarks/shapes/llama-8b -tp 2

Random weights are never guessed right, so the folder gets a pair of models of the shape whose texts are
known. They work as hard as others; but their layers add next to nothing to the embedding, and the head names
a successor for each token. The draft has the first of the layers and the same successors for --agreement of
the tokens. Successors run in circles, so that a text repeats itself, and n-grams find what follows.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

from distllm import LLM, SamplingParams
from distllm.cli.bench import count_option, output_option
from distllm.cli.options import tensor_parallel
from distllm.cli.tables import print_table
from distllm.engine import read_spec
from distllm.errors import UserError
from distllm.models.registry import family_named
from distllm.models.shards import slot_shapes
from distllm.ops.bench.report import Report
from distllm.ops.bench.timing import Summary, summarize

CIRCLE = 50  # tokens until a text repeats itself
INPUT_LEN, RAMP = 128, 32  # tokens of a prompt; of the shorter call, in which prompts are computed
DAMPED = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Result:
    way: str
    batch_size: int
    tokens_per_s: Summary
    gain: float  # over no drafts, of medians
    acceptance_rate: float
    tokens_per_step: float


def make_pair(folder: Path, shape: Path, draft_layers: int, agreement: float) -> None:
    """folder/model and folder/draft, unless they are there."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = json.loads((shape / "config.json").read_text())
    vocab_size, hidden_size = config["vocab_size"], config["hidden_size"]
    embedding = torch.randn(vocab_size, hidden_size, dtype=torch.bfloat16, device=device)
    successors = circles(vocab_size)
    guessed = successors.clone()
    wrong = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(1))[
        : round(vocab_size * (1 - agreement))
    ]
    guessed[wrong] = successors[wrong.roll(1)]
    layers = config["num_hidden_layers"]
    for name, num_layers, follows in (("model", layers, successors), ("draft", draft_layers, guessed)):
        if not (folder / name).exists():
            config["num_hidden_layers"] = num_layers
            head = torch.empty_like(embedding)
            head[follows.to(device)] = embedding
            write_model(folder / name, config, embedding, head)


def circles(vocab_size: int) -> torch.Tensor:
    """Of each token the next one; all tokens stand in circles of CIRCLE, the last one may be shorter."""
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0))
    follows = torch.empty_like(order)
    for circle in order.split(CIRCLE):
        follows[circle] = circle.roll(-1)
    return follows


def write_model(folder: Path, config: dict[str, Any], embedding: torch.Tensor, head: torch.Tensor) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number, tensors in enumerate(parts(folder, embedding, head)):
        file = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def parts(folder: Path, embedding: torch.Tensor, head: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """The checkpoint's tensors, file by file: one for each layer, one for all else."""
    spec = read_spec(folder)
    family = family_named(spec.family)
    sources = {
        s.names[0]: s.shape for s in (family.source(spec, *slot) for slot in slot_shapes(spec).items())
    }
    rest = {name: shape for name, shape in sources.items() if ".layers." not in name}
    layers = [
        {name: shape for name, shape in sources.items() if f".layers.{i}." in name}
        for i in range(spec.num_layers)
    ]
    known = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    for each in (rest, *layers):
        yield {
            name: known[name].cpu() if name in known else random_weight(name, shape, embedding.device)
            for name, shape in each.items()
        }


def random_weight(name: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = 1e-4 if any(part in name for part in DAMPED) else 0.02
    return (torch.randn(shape, dtype=torch.bfloat16, device=device) * scale).cpu()


def prompts_of(num_prompts: int, vocab_size: int) -> list[list[int]]:
    """Texts that the model would write itself, each from another place."""
    follows = circles(vocab_size).tolist()
    prompts = [[start * vocab_size // num_prompts] for start in range(num_prompts)]
    for prompt in prompts:
        for _ in range(INPUT_LEN - 1):
            prompt.append(follows[prompt[-1]])
    return prompts


def rate(llm: LLM, prompts: list[list[int]], num_tokens: int) -> float:
    """Tokens a second of a batch that decodes."""

    def generate_s(count: int) -> float:
        start = time.perf_counter()
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
        return time.perf_counter() - start

    return len(prompts) * num_tokens / (generate_s(RAMP + num_tokens) - generate_s(RAMP))


def measure(
    way: str, llm: LLM, batch_sizes: tuple[int, ...], num_tokens: int, num_iters: int, plain: dict[int, float]
) -> Iterator[Result]:
    """Collective. plain: medians without drafts, by batch size; filled by the way without."""
    for batch_size in batch_sizes:
        prompts = prompts_of(batch_size, llm.spec.vocab_size)
        rate(llm, prompts, num_tokens)  # warms up, and lets speculation find out whether it pays
        before = counts(llm)
        rates = summarize([rate(llm, prompts, num_tokens) for _ in range(num_iters)])
        steps, drafted, accepted = (b - a for a, b in zip(before, counts(llm), strict=True))
        median = plain.setdefault(batch_size, rates.median)
        acceptance, per_step = accepted / max(drafted, 1), 1 + accepted / max(steps, 1)
        yield Result(way, batch_size, rates, rates.median / median, acceptance, per_step)


def counts(llm: LLM) -> tuple[int, int, int]:
    stats = llm.speculation_stats() if llm.is_root else None
    return (0, 0, 0) if stats is None else (
        stats.num_verifications, stats.num_draft_tokens, stats.num_accepted_tokens
    )  # fmt: skip


def show(results: list[Result]) -> None:
    rows = [
        (r.way, r.batch_size, f"{r.tokens_per_s.median:,.0f}", f"{r.gain:.2f} ×", f"{r.acceptance_rate:.0%}",
         f"{r.tokens_per_step:.2f}")
        for r in results
    ]  # fmt: skip
    header = ["drafts", "batch", "tokens/s", "gain", "accepted", "tokens per verification"]
    print_table("Decode with speculation", header, rows)


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("shape", type=click.Path(file_okay=False, exists=True, path_type=Path))
@tensor_parallel
@click.option("--batch-size", type=int, multiple=True, default=(1, 8, 32, 128), show_default=True)
@click.option("--num-drafts", type=int, default=4, show_default=True, help="Of a request in a step, at most.")
@click.option("--draft-layers", type=int, default=2, show_default=True)
@click.option(
    "--agreement", type=float, default=0.8, show_default=True, help="Share of tokens that the draft knows."
)
@count_option("--num-tokens", 256, "Of each request that are timed.")
@count_option("--num-iters", 3, "Runs that count.")
@output_option
def main(
    folder: Path, shape: Path, batch_size: tuple[int, ...], num_drafts: int, draft_layers: int,
    agreement: float, num_tokens: int, num_iters: int, output: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Measure every way and print a table."""
    make_pair(folder, shape, draft_layers, agreement)
    ways: dict[str, dict[str, Any] | None] = {
        "none": None,
        "n-gram": {"method": "ngram", "num_speculative_tokens": num_drafts},
        f"{draft_layers} layers": {
            "method": "draft_model",
            "model": str(folder / "draft"),
            "num_speculative_tokens": num_drafts,
        },
    }
    options |= {"max_num_seqs": max(batch_size), "max_model_len": 1024, "enable_prefix_caching": False}
    results: list[Result] = []
    plain: dict[int, float] = {}
    try:
        for way, config in ways.items():
            with LLM(str(folder / "model"), speculative_config=config, **options) as llm:
                results += measure(way, llm, batch_size, num_tokens, num_iters, plain)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    if llm.is_root:
        show(results)
        if output:
            command, facts = shlex.join(["python", *sys.argv]), {"engine": asdict(llm.config)}
            Report("speculation", command, llm.layout.world_size, facts, None, results).write(output)


if __name__ == "__main__":
    main()
