"""The options that several commands share, named as in vLLM. What the values go into checks their bounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from distllm.config import DTYPES, EngineConfig
from distllm.runtime.sampling.sampling_params import SamplingParams

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

tensor_parallel = click.option(
    "-tp",
    "--tensor-parallel-size",
    type=int,
    default=1,
    show_default=True,
    help="Ranks that share each layer.",
)
pipeline_parallel = click.option(
    "-pp", "--pipeline-parallel-size", type=int, default=1, show_default=True, help="Stages of layers."
)
dtype = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    help="Of weights and activations.",
)


def layout_options(command: Callable[..., Any]) -> Callable[..., Any]:
    return tensor_parallel(pipeline_parallel(command))


def _option(name: str, default: Any, kind: Any, text: str) -> Decorator:
    return click.option(name, type=kind, default=default, show_default=default is not None, help=text)


def _apply(command: Callable[..., Any], options: list[Decorator]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command


def parse_json(_context: click.Context, _option: click.Parameter, value: str | None) -> dict[str, Any] | None:
    """What stands in an option as a JSON object."""
    if value is None:
        return None
    try:
        found = json.loads(value)
    except json.JSONDecodeError as error:
        raise click.BadParameter(f"it is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise click.BadParameter('it must be a JSON object, like {"method": "ngram"}')
    return found


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The fields of EngineConfig that a command line may set."""
    return _apply(
        command,
        [
            tensor_parallel,
            pipeline_parallel,
            dtype,
            _option("--seed", EngineConfig.seed, int, "Of all random numbers; the same seed, the same text."),
            _option("--max-model-len", None, int, "Prompt and generated tokens of one sequence."),
            _option("--max-num-seqs", EngineConfig.max_num_seqs, int, "Sequences that run at the same time."),
            _option(
                "--max-num-batched-tokens", EngineConfig.max_num_batched_tokens, int, "Tokens of one step."
            ),
            click.option(
                "--speculative-config",
                callback=parse_json,
                help='How tokens are guessed: \'{"method": "ngram"}\', or "draft_model" with a "model".',
            ),
        ],
    )


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The fields of SamplingParams that a command line may set."""
    return _apply(
        command,
        [
            _option("--max-tokens", 128, int, "Tokens to generate at most."),
            _option(
                "--temperature", None, float, "0 is greedy; these five default to the model's own choice."
            ),
            _option("--top-p", None, float, "Sample from the likeliest with this probability."),
            _option("--top-k", None, int, "Sample from so many likeliest tokens; 0 is all."),
            _option("--min-p", None, float, "Drop tokens below this share of the likeliest."),
            _option("--repetition-penalty", None, float, "Above 1: fewer tokens of prompt and output again."),
            _option("--presence-penalty", SamplingParams.presence_penalty, float, "Of tokens in the output."),
            _option(
                "--frequency-penalty", SamplingParams.frequency_penalty, float, "The same for each time."
            ),
            _option(
                "--typical-p", SamplingParams.typical_p, float, "Sample from the typical with this mass."
            ),
            _option(
                "--no-repeat-ngram-size",
                SamplingParams.no_repeat_ngram_size,
                int,
                "So many tokens never come twice in that order.",
            ),
            click.option("--bad-words", multiple=True, help="A text never to write; repeat for several."),
            _option("--n", SamplingParams.n, int, "Continuations of each prompt."),
            click.option("--stop", multiple=True, help="End before this text; repeat for several."),
            click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-sequence token."),
            _option("--logprobs", None, int, "Report so many likeliest tokens at each position."),
            _option("--prompt-logprobs", None, int, "The same at each position of the prompt."),
        ],
    )
