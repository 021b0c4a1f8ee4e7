"""`distllm generate`: continue prompts and print them. Every rank runs it; rank 0 prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import IO, TYPE_CHECKING, Any

import click

from distllm.cli.options import engine_options, sampling_options
from distllm.cli.progress import show_progress
from distllm.env import launcher_identity
from distllm.runtime.sampling.sampling_params import SamplingParams
from distllm.runtime.structured.structured_outputs import MAX_GRAMMAR_CHARS, StructuredOutputsParams

if TYPE_CHECKING:
    from distllm.runtime.llm import LLM
    from distllm.runtime.outputs import CompletionOutput, RequestOutput


def parse_token_ids(
    _context: click.Context, _option: click.Parameter, values: tuple[str, ...]
) -> list[list[int]]:
    try:
        return [[int(token_id) for token_id in value.split(",")] for value in values]
    except ValueError as error:
        raise click.BadParameter(f"{error}; write integers with commas between them, like 5,17,9") from error


@click.command()
@click.argument("model")
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; repeat for several.")
@click.option(
    "--prompt-token-ids", multiple=True, callback=parse_token_ids, help="A prompt as ids: 5,17,9; repeatable."
)
@engine_options
@sampling_options
@click.option("--json-schema", type=click.File(), help="The text is JSON by the schema in this file.")
@click.option("--regex", help="The whole text matches.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each prompt.")
@click.option(
    "--stream", is_flag=True, help="Print text as it comes; with --json, one object for each increment."
)
def generate(
    model: str,
    prompts: tuple[str, ...],
    prompt_token_ids: list[list[int]],
    json_schema: IO[str] | None,
    regex: str | None,
    as_json: bool,
    stream: bool,
    **options: Any,
) -> None:
    """Continue prompts.

    MODEL is a Hugging Face folder, an engine folder, or `demo`. The job must have -tp × -pp ranks.
    """
    check_usage(prompts, prompt_token_ids, streams_text=stream and not as_json, n=options["n"])
    sampling_names = {field.name for field in fields(SamplingParams)} - {"seed"}
    wanted = {name: options.pop(name) for name in sampling_names & options.keys()}
    wanted["structured_outputs"] = form_of_text(json_schema, regex)
    wanted = {name: value for name, value in wanted.items() if value is not None}
    SamplingParams(**wanted)  # refuses before anything is loaded
    asked = list(prompts) or prompt_token_ids

    from distllm.runtime.llm import LLM

    identity = launcher_identity()
    with show_progress(f"loading {model}", identity.rank if identity else 0) as progress:
        llm = LLM(model, progress=progress, **options)
    with llm:
        sampling = replace(llm.get_default_sampling_params(), **wanted)
        if stream:
            print_stream(llm, asked, sampling, as_json)
        else:
            print_outputs(llm.generate(asked, sampling), as_json)


def form_of_text(json_schema: IO[str] | None, regex: str | None) -> StructuredOutputsParams | None:
    if json_schema is None and regex is None:
        return None
    schema = json_schema.read(MAX_GRAMMAR_CHARS + 1) if json_schema else None
    return StructuredOutputsParams(json=schema, regex=regex)


def check_usage(
    prompts: Sequence[str], prompt_token_ids: Sequence[object], streams_text: bool, n: int
) -> None:
    check_prompts(prompts, prompt_token_ids)
    if streams_text and (prompt_token_ids or len(prompts) * n > 1):
        raise click.UsageError("--stream prints the text of one prompt; for anything else add --json")


def check_prompts(prompts: Sequence[str], prompt_token_ids: Sequence[object]) -> None:
    if bool(prompts) == bool(prompt_token_ids):
        raise click.UsageError("give --prompt or --prompt-token-ids, at least once, and not both")


def print_stream(llm: LLM, prompts: Any, sampling: SamplingParams, as_json: bool) -> None:
    """Every rank iterates; only rank 0 is given anything to print."""
    if not as_json:
        click.secho(prompts[0], dim=True, nl=False)
    for output in llm.stream(prompts, sampling):
        if as_json:
            click.echo(json.dumps(asdict(output)))
        else:
            click.echo(output.outputs[0].text, nl=False)
    if not as_json:
        click.echo()


def print_outputs(outputs: list[RequestOutput], as_json: bool) -> None:
    """A prompt given as text is continued as text, after the prompt; one given as ids, as ids alone."""
    if as_json:
        for output in outputs:
            click.echo(json.dumps(asdict(output)))
        return
    texts = [text_of(output, completion) for output in outputs for completion in output.outputs]
    click.echo("\n\n".join(texts))


def text_of(output: RequestOutput, completion: CompletionOutput) -> str:
    if output.prompt is None:
        return ",".join(map(str, completion.token_ids))
    return click.style(output.prompt, dim=True) + completion.text
