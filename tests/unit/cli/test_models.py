"""`distllm models`, and that docs/models.md is what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distllm.cli.main import cli
from distllm.models.registry import FAMILIES

DOC = Path(__file__).parents[3] / "docs" / "models.md"


def printed(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    cli.main(["models", *options], prog_name="distllm", standalone_mode=False)
    return capsys.readouterr().out


def test_every_family_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(printed(capsys, "--json"))
    assert [row["model_type"] for row in rows] == [family.name for family in FAMILIES]
    assert all(row["architectures"] and row["models"] for row in rows)
    assert not any("|" in row["models"] + row["notes"] for row in rows)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys).splitlines()
    assert len([line for line in lines if "ForCausalLM" in line]) >= 10
    assert any(
        line.split()[:3] == ["chatglm", "ChatGLMModel,", "ChatGLMForConditionalGeneration"] for line in lines
    )


def test_document_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert DOC.read_text() == printed(capsys, "--markdown"), "run `make docs`"
