"""What the commands print, without a model: tables, sizes, progress, log lines."""

from __future__ import annotations

import logging
import sys

import click
import pytest

from distllm.cli import logs
from distllm.cli.generate import parse_token_ids, print_outputs
from distllm.cli.main import cli, one_line
from distllm.cli.plan import format_bytes, print_description, rank_span
from distllm.cli.progress import show_progress
from distllm.cli.tables import print_table
from distllm.engine.describe import describe
from distllm.models.rope_spec import RopeSpec
from distllm.runtime.outputs import CompletionOutput, RequestOutput
from tests.specs import llama_spec

SPEC = llama_spec(
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    rope=RopeSpec(500000.0),
    max_position_embeddings=131072,
    dtype="bfloat16",
)


def output(prompt: str | None, *texts: str) -> RequestOutput:
    completions = [CompletionOutput(index, text, [5, 17]) for index, text in enumerate(texts)]
    return RequestOutput("0", prompt, [1, 2], completions)


def test_texts_follow_their_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    print_outputs([output("One", " day", " night"), output("Two", "!")], as_json=False)
    assert capsys.readouterr().out == "One day\n\nOne night\n\nTwo!\n"


def test_token_ids_are_answered_in_token_ids(capsys: pytest.CaptureFixture[str]) -> None:
    print_outputs([output(None, "text that a tokenizer made")], as_json=False)
    assert capsys.readouterr().out == "5,17\n"


def test_token_ids_are_parsed() -> None:
    context = click.Context(cli)
    option = click.Option(["--prompt-token-ids"])
    assert parse_token_ids(context, option, ("1,2", " 3 ")) == [[1, 2], [3]]
    for wrong in ("", "1,,2", "1.5", "one"):
        with pytest.raises(click.BadParameter, match="5,17,9"):
            parse_token_ids(context, option, (wrong,))


def test_usage_errors_are_one_line() -> None:
    with pytest.raises(click.UsageError) as caught:
        cli.main(["generate", "demo", "--promt", "x"], prog_name="distllm", standalone_mode=False)
    text = one_line(caught.value)
    assert "\n" not in text and "--promt" in text and "distllm generate --help" in text


# docs/ranks.md works this example by hand.


def test_plan_of_the_documented_example(capsys: pytest.CaptureFixture[str]) -> None:
    print_description(describe(SPEC, 4, 2))
    out = capsys.readouterr().out
    assert "llama, 8,030,261,248 parameters, bfloat16" in out and "tp 4 × pp 2 = 8 ranks" in out
    assert ["5", "1", "1", "16–31", "8", "2"] in [line.split()[:6] for line in out.splitlines()]
    last_stage = out.split("Tensors of ranks 4–7, each")[1]
    for shape in ("[1536, 4096]", "[4096, 1024]", "[7168, 4096]", "[4096, 3584]", "[32064, 4096]"):
        assert shape in last_stage
    rank_5 = describe(SPEC, 4, 2).ranks[5]
    assert (rank_5.weight_bytes, rank_5.kv_bytes_per_token) == (2_007_769_088, 16 * 1024)


def test_plan_keeps_unlike_ranks_apart(capsys: pytest.CaptureFixture[str]) -> None:
    print_description(describe(SPEC, 1, 3))
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("Tensors")] == [
        "Tensors of rank 0",
        "Tensors of rank 1",
        "Tensors of rank 2",
    ]


def test_rank_span() -> None:
    assert (rank_span([3]), rank_span([4, 5, 6])) == ("rank 3", "ranks 4–6, each")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (2**31, "2 GiB"), (2**52, "4096 TiB")],
)
def test_format_bytes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_table_is_ruled_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("alpha", 1), ("b", 22)]
    print_table("Title", ("name", "count"), rows)
    assert capsys.readouterr().out == "\nTitle\n  name   count\n  alpha  1\n  b      22\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table("Title", ("name", "count"), rows)
    assert "│ alpha" in capsys.readouterr().out


def test_progress_is_lines_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distllm.cli.progress.LINE_EVERY_S", 0.0)
    with show_progress("building", rank=0) as report:
        assert report
        report(2**20, 2**22)
    assert capsys.readouterr().err == "building: 1 of 4 MiB\n"


def test_progress_waits_before_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("building", rank=0) as report:
        assert report
        report(1, 2)
    assert capsys.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with show_progress("building", rank=0) as report:
        assert report
        report(2**22, 2**22)
    assert "4.2/4.2 MB" in capsys.readouterr().err


def test_other_ranks_show_no_progress() -> None:
    with show_progress("building", rank=1) as report:
        assert report is None


@pytest.mark.parametrize(("rank", "num_lines"), [(0, 2), (3, 1)])
def test_only_rank_0_informs(rank: int, num_lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(rank)
    logger = logging.getLogger("distllm.some.module")
    logger.info("loaded")
    logger.warning("slow")
    lines = capsys.readouterr().err.splitlines()
    logging.getLogger("distllm").handlers.clear()
    assert len(lines) == num_lines
    assert lines[-1].startswith(f"[rank {rank} ") and lines[-1].endswith("WARNING slow")
