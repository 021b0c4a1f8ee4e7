"""`distllm beam-search`: the likeliest continuations of prompts. Every rank runs it; rank 0 prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from distllm.cli.generate import check_prompts, parse_token_ids
from distllm.cli.options import engine_options
from distllm.cli.progress import show_progress
from distllm.env import launcher_identity
from distllm.runtime.beams.beam_search_params import BeamSearchParams

if TYPE_CHECKING:
    from distllm.runtime.outputs import BeamSearchOutput

EARLY_STOPPING = {"true": True, "false": False, "never": "never"}


@click.command("beam-search")
@click.argument("model")
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; repeat for several.")
@click.option(
    "--prompt-token-ids", multiple=True, callback=parse_token_ids, help="A prompt as ids: 5,17,9; repeatable."
)
@engine_options
@click.option("--beam-width", type=int, default=4, show_default=True, help="Sequences that are looked at.")
@click.option("--max-tokens", type=int, default=128, show_default=True, help="Tokens to generate at most.")
@click.option("--n", type=int, default=1, show_default=True, help="The best sequences to print.")
@click.option(
    "--length-penalty", type=float, default=BeamSearchParams.length_penalty, show_default=True,
    help="Score = log-probability / tokens ** this.",
)  # fmt: skip
@click.option(
    "--early-stopping", type=click.Choice(list(EARLY_STOPPING)), default="false", show_default=True,
    help="When enough sequences have ended: stop, look whether one can still win, or look on to the end.",
)  # fmt: skip
@click.option(
    "--num-beam-groups", type=int, default=BeamSearchParams.num_beam_groups, show_default=True,
    help="Divide the beams into groups that each search by themselves.",
)  # fmt: skip
@click.option(
    "--diversity-penalty", type=float, default=BeamSearchParams.diversity_penalty, show_default=True,
    help="What a token costs a beam for each beam of earlier groups that takes it too.",
)  # fmt: skip
@click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-sequence token.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each prompt.")
def beam_search(
    model: str,
    prompts: tuple[str, ...],
    prompt_token_ids: list[list[int]],
    beam_width: int,
    max_tokens: int,
    n: int,
    length_penalty: float,
    early_stopping: str,
    num_beam_groups: int,
    diversity_penalty: float,
    ignore_eos: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Search the likeliest continuations of prompts.

    MODEL is a Hugging Face folder, an engine folder, or `demo`. The job must have -tp × -pp ranks.
    """
    check_prompts(prompts, prompt_token_ids)
    params = BeamSearchParams(
        beam_width=beam_width,
        max_tokens=max_tokens,
        n=n,
        length_penalty=length_penalty,
        early_stopping=EARLY_STOPPING[early_stopping],  # type: ignore[arg-type]
        ignore_eos=ignore_eos,
        num_beam_groups=num_beam_groups,
        diversity_penalty=diversity_penalty,
    )

    from distllm.runtime.llm import LLM

    identity = launcher_identity()
    with show_progress(f"loading {model}", identity.rank if identity else 0) as progress:
        llm = LLM(model, progress=progress, **options)
    with llm:
        outputs = llm.beam_search(list(prompts) or prompt_token_ids, params)
    print_outputs(outputs, as_json, as_ids=not prompts)


def print_outputs(outputs: list[BeamSearchOutput], as_json: bool, as_ids: bool) -> None:
    """Whole sequences, the prompt included; as ids where the prompt was."""
    if as_json:
        for output in outputs:
            click.echo(json.dumps(asdict(output)))
        return
    found = [sequence for output in outputs for sequence in output.sequences]
    click.echo("\n\n".join(",".join(map(str, s.tokens)) if as_ids else s.text for s in found))
