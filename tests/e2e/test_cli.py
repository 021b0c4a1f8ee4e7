"""The commands as a user types them, on one rank: what they print."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from distllm import LLM, BeamSearchParams, SamplingParams, __version__
from tests import launchers
from tests.command import GREEDY, check_refused, distllm, generate_ids


def test_version() -> None:
    assert distllm("--version").stdout == f"distllm, version {__version__}\n"


@pytest.mark.parametrize("args", [["-h"], ["--help"], ["generate", "-h"], []])
def test_help(args: list[str]) -> None:
    done = distllm(*args)
    assert done.returncode == 0 and "Usage: distllm" in done.stdout


def test_prompts_come_back_in_order_as_json(tiny: Path) -> None:
    done = generate_ids(
        tiny, "--prompt-token-ids", "5,6,7", "--prompt-token-ids", "9", "--json", "--ignore-eos"
    )
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["prompt_token_ids"], second["prompt_token_ids"]) == ([5, 6, 7], [9])
    assert len(first["outputs"][0]["token_ids"]) == 5 and first["outputs"][0]["finish_reason"] == "length"


def test_stream_gives_the_same_tokens(tiny: Path) -> None:
    asked = ("--prompt-token-ids", "5,6,7", "--ignore-eos", "--logprobs", "2", "--json")
    whole = json.loads(generate_ids(tiny, *asked).stdout)["outputs"][0]
    increments = [
        json.loads(line)["outputs"][0] for line in generate_ids(tiny, *asked, "--stream").stdout.splitlines()
    ]
    assert len(increments) > 1
    for field in ("token_ids", "logprobs"):
        assert [item for piece in increments for item in piece[field]] == whole[field]


def test_token_ids_are_continued_as_token_ids(tiny: Path) -> None:
    done = generate_ids(tiny, "--prompt-token-ids", "5,6,7", "--n", "2", "--ignore-eos")
    first, blank, second = done.stdout.splitlines()
    assert first == second and blank == "" and len(first.split(",")) == 5


def test_text_is_printed_after_its_prompt() -> None:
    for options in ([], ["--stream"]):
        done = distllm("generate", "demo", "--prompt", "Once upon a time", *GREEDY, *options)
        assert done.stdout.startswith("Once upon a time") and len(done.stdout) > 20, done.stderr


def test_options_are_those_of_sampling_params() -> None:
    fields = {
        "temperature": 0.9, "top_p": 0.95, "top_k": 50, "min_p": 0.01, "typical_p": 0.9,
        "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.25,
        "no_repeat_ngram_size": 2, "logprobs": 1, "prompt_logprobs": 1, "max_tokens": 12,
    }  # fmt: skip
    options = [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", value)]
    done = distllm("generate", "demo", "--prompt", "Once upon", *options, "--bad-words", "little", "--json")
    with LLM("demo") as llm:
        (wanted,) = llm.generate("Once upon", SamplingParams(bad_words=["little"], **fields))
    assert json.loads(done.stdout) == json.loads(json.dumps(asdict(wanted)))


def test_beam_search(tiny: Path) -> None:
    asked = ("--prompt-token-ids", "5,6,7", "--beam-width", 3, "--max-tokens", 6, "--early-stopping", "never")
    done = distllm("beam-search", tiny, *asked, "--n", 2, "--length-penalty", 0.5, "--json")
    params = BeamSearchParams(beam_width=3, max_tokens=6, n=2, length_penalty=0.5, early_stopping="never")
    with LLM(str(tiny)) as llm:
        (wanted,) = llm.beam_search([5, 6, 7], params)
    assert json.loads(done.stdout) == asdict(wanted)
    best = ",".join(map(str, wanted.sequences[0].tokens))
    assert distllm("beam-search", tiny, *asked, "--length-penalty", 0.5).stdout == best + "\n"
    groups = {"num_beam_groups": 3, "diversity_penalty": 1.5}
    done = distllm("beam-search", tiny, *asked, "--num-beam-groups", 3, "--diversity-penalty", 1.5, "--json")
    with LLM(str(tiny)) as llm:
        (wanted,) = llm.beam_search([5, 6, 7], replace(params, n=1, length_penalty=1.0, **groups))
    assert json.loads(done.stdout) == asdict(wanted)
    check_refused(distllm("beam-search", tiny, *asked, "--num-beam-groups", 2), "num_beam_groups is 2", "(3)")
    text = distllm("beam-search", "demo", "--prompt", "Once upon", "--max-tokens", 4).stdout
    assert text.startswith("Once upon") and len(text) > 12
    check_refused(distllm("beam-search", tiny, *asked[:2], "--beam-width", 33), "beam_width is 33", "32")
    check_refused(distllm("beam-search", tiny), "--prompt or --prompt-token-ids")


def test_same_seed_same_text_but_not_for_every_prompt(tiny: Path) -> None:
    def sampled(seed: int) -> list[str]:
        twice = ("--prompt-token-ids", "5") * 2
        return distllm("generate", tiny, *twice, "--seed", seed, "--max-tokens", 20).stdout.split()

    first, second = sampled(1)
    assert sampled(1) == [first, second] != sampled(2)
    assert first != second


def test_engine_gives_the_same_tokens(tiny: Path, tmp_path: Path) -> None:
    built = distllm("build", tiny, "-o", tmp_path / "engine", "-tp", 2, "-pp", 2)
    assert built.returncode == 0, built.stderr
    asked = ("--prompt-token-ids", "5,6,7", "--ignore-eos")
    assert generate_ids(tmp_path / "engine", *asked).stdout == generate_ids(tiny, *asked).stdout != ""


def test_plan_adds_up(tiny: Path) -> None:
    done = distllm("plan", tiny, "-tp", 2, "-pp", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["ranks"]) == 4
    assert "tp 2 × pp 2 = 4 ranks" in distllm("plan", tiny, "-tp", 2, "-pp", 2).stdout


def test_env_tells_versions_and_no_secret() -> None:
    facts = json.loads(distllm("env", "--json").stdout)
    assert facts["distllm"] == __version__ and facts["torch"].startswith("2.")
    assert facts["launcher"] == "none (one process)"
    secret = "hf_do_not_print_me"
    assert secret not in distllm("env", env=launchers.clean_environ() | {"HF_TOKEN": secret}).stdout


def take_interrupts() -> None:
    """A process that was started in the background ignores Ctrl-C, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupt_is_quiet(tiny: Path) -> None:
    options = [
        "--prompt-token-ids",
        "5",
        "--ignore-eos",
        "--n",
        "64",
        "--max-tokens",
        "255",
        "--stream",
        "--json",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "distllm", "generate", str(tiny), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=launchers.clean_environ(),
        preexec_fn=take_interrupts,
    ) as running:
        assert running.stdout and running.stdout.readline()
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=30)
    assert running.returncode == 130 and "Traceback" not in err
