"""The worked example of docs/adding-a-model.md, run as it stands there, against transformers' StableLM."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from distllm.models import registry
from distllm.parallel.layout import RankLayout
from tests.checkpoints import make_model
from tests.unit.models.stepping import run_layout

DOC = Path(__file__).parents[3] / "docs" / "adding-a-model.md"


@pytest.mark.parametrize("grid", [RankLayout(), RankLayout(2, 2)])
def test_stablelm_of_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: RankLayout) -> None:
    names: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)[1], names)  # type: ignore[index]
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, names["STABLELM"]))
    model = make_model(tmp_path, "stablelm", vocab_size=71, num_hidden_layers=3, use_qkv_bias=True)
    text = torch.randint(71, (29,)).tolist()
    with torch.no_grad():
        wanted = model(torch.tensor([text])).logits[0]
    assert (run_layout(tmp_path, grid, [text])[0] - wanted).abs().max() <= 2e-4
