"""A small checkpoint to read, cut and damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.checkpoints import make_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 heads, 2 KV heads, biases, odd widths, a tokenizer's files. Read only."""
    folder = tmp_path_factory.mktemp("engine") / "llama"
    sizes = {"hidden_size": 30, "intermediate_size": 37, "vocab_size": 41, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6}
    make_llama(folder, attention_bias=True, mlp_bias=True, **sizes, **heads)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    """The same checkpoint in a folder of the test's own."""
    return Path(shutil.copytree(llama, tmp_path / "model"))
