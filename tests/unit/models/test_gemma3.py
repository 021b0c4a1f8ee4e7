"""Gemma 3 as the models that see images hold it, against transformers' class for those, given text alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

from distllm.engine import read_spec
from distllm.errors import CheckpointError
from distllm.models.gemma3 import DEFAULTS
from distllm.models.registry import parse_config
from distllm.parallel.layout import RankLayout
from tests.checkpoints import is_gain
from tests.unit.models.family_cases import CASES, SIZES
from tests.unit.models.stepping import run_layout

EYES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
TEXT = {key: value for key, value in CASES["gemma3"].options.items() if key != "tie_word_embeddings"}
RELEASED = {  # 4B, as published
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152},
}


def make_model(folder: Path) -> Any:
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=SIZES | TEXT,
        vision_config=EYES | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=66,
    )
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0, 0.2) if is_gain(name) else parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("layout", [RankLayout(), RankLayout(2, 2)], ids=["1", "2x2"])
def test_logits(layout: RankLayout, tmp_path: Path) -> None:
    model = make_model(tmp_path)
    texts = [[(7 * n + length) % 60 for n in range(length)] for length in (1, 5, 40)]
    with torch.no_grad():
        wanted = [model(torch.tensor([text])).logits[0] for text in texts]
    for a, b in zip(wanted, run_layout(tmp_path, layout, texts, seed=1), strict=True):
        assert float((a - b).abs().max()) <= 2e-4


def test_what_released_files_leave_out() -> None:
    defaults = Gemma3TextConfig()
    assert {key: getattr(defaults, key) for key in DEFAULTS} == DEFAULTS
    spec = parse_config(RELEASED)
    assert (spec.head_dim, spec.attention_scale, spec.dtype) == (256, 256**-0.5, "bfloat16")
    assert spec.tied_embeddings and spec.windows[:6] == (1024,) * 5 + (0,)
    assert spec.rope and spec.rope.scaling and spec.window_rope and not spec.window_rope.scaling


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"text_config": [1]}, r"text_config is \[1\]; it must be an object"),
        ({"text_config": {}}, "is missing"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        parse_config(RELEASED | changes)


def test_without_text_config(tmp_path: Path) -> None:
    config = {key: value for key, value in RELEASED.items() if key != "text_config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="vision_config"):
        read_spec(tmp_path)
