"""`distllm build`: a model folder becomes an engine. Every rank of the job writes its share of the files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from distllm.cli.options import dtype as dtype_option
from distllm.cli.options import layout_options
from distllm.cli.progress import show_progress

if TYPE_CHECKING:
    from distllm.models.spec import DType


@click.command()
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The engine folder to write."
)
@layout_options
@dtype_option
def build(
    model: str,
    output: Path,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    dtype: Literal["auto"] | DType,
) -> None:
    """Write a model folder as an engine.

    MODEL is a Hugging Face folder, or an engine to be cut anew. Any number of ranks may build for any layout.
    --dtype auto is the checkpoint's own.
    """
    from distllm.comm.agree import agree
    from distllm.comm.connect import open_control
    from distllm.engine import build_engine, open_source, resolve_model

    control = open_control()
    source = agree(control, lambda: open_source(resolve_model(model)))
    kept = source.spec.dtype if dtype == "auto" else dtype
    sizes = (tensor_parallel_size, pipeline_parallel_size)
    with show_progress(f"building {output}", control.rank) as progress:
        build_engine(source, output, *sizes, kept, control, progress)
    if control.rank == 0:
        click.echo(f"built {output} from {model}: tp {sizes[0]} × pp {sizes[1]}, {kept}")
    control.close()
