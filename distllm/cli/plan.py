"""`distllm plan`: what each rank of a layout would hold. Needs no MPI, no torch and no weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Literal

import click

from distllm.cli.options import dtype as dtype_option
from distllm.cli.options import layout_options
from distllm.cli.tables import print_table

if TYPE_CHECKING:
    from distllm.engine.describe import ModelDescription, RankDescription
    from distllm.models.spec import DType

RANK_COLUMNS = ("rank", "pp", "tp", "layers", "heads", "KV heads", "weights", "KV cache per token")
SHARD_COLUMNS = ("tensor", "count", "shape", "bytes")


@click.command()
@click.argument("model")
@layout_options
@dtype_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(
    model: str,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    dtype: Literal["auto"] | DType,
    as_json: bool,
) -> None:
    """Show what each rank of a layout would hold.

    MODEL is a Hugging Face folder, an engine folder, or `demo`. Reads no weights. --dtype auto is the
    checkpoint's own.
    """
    from distllm.engine.describe import describe
    from distllm.engine.resolve import read_spec, resolve_model

    spec = read_spec(resolve_model(model))
    description = describe(
        spec, tensor_parallel_size, pipeline_parallel_size, None if dtype == "auto" else dtype
    )
    if as_json:
        click.echo(json.dumps(asdict(description)))
    else:
        print_description(description)


def print_description(model: ModelDescription) -> None:
    click.echo(
        f"{model.family}, {model.num_parameters:,} parameters, {model.dtype}, "
        f"window {model.max_position_embeddings}: {model.equation}"
    )
    print_table("Ranks", RANK_COLUMNS, [rank_row(rank) for rank in model.ranks])
    for shards, alike in groupby(model.ranks, key=lambda rank: rank.shards):
        rows = [(s.name, s.count, list(s.shape), format_bytes(s.num_bytes)) for s in shards]
        print_table(f"Tensors of {rank_span([rank.rank for rank in alike])}", SHARD_COLUMNS, rows)


def rank_row(rank: RankDescription) -> tuple[object, ...]:
    first, stop = rank.layers
    layers = f"{first}–{stop - 1}"
    sizes = (format_bytes(rank.weight_bytes), format_bytes(rank.kv_bytes_per_token))
    return (rank.rank, rank.pp_rank, rank.tp_rank, layers, rank.num_heads, rank.num_kv_heads, *sizes)


def rank_span(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}–{ranks[-1]}, each"


def format_bytes(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} TiB"
