"""The worked example of docs/adding-a-model.md is run as it stands there, against transformers' own Qwen2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from distllm.models import registry
from distllm.parallel.layout import RankLayout
from tests.unit.models.stepping import run_layout

DOC = Path(__file__).parents[3] / "docs" / "adding-a-model.md"


@pytest.mark.parametrize("grid", [RankLayout(), RankLayout(2, 2)])
def test_qwen2_of_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: RankLayout) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    names: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)[1], names)  # type: ignore[index]
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, names["QWEN2"]))

    torch.manual_seed(0)
    sizes = {"vocab_size": 71, "hidden_size": 32, "intermediate_size": 45, "num_hidden_layers": 3}
    model = (
        Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).float().eval()
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    text = torch.randint(71, (29,)).tolist()
    with torch.no_grad():
        wanted = model(torch.tensor([text])).logits[0]
    assert (run_layout(tmp_path, grid, [text])[0] - wanted).abs().max() <= 2e-4
