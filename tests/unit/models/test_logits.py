"""Logits against transformers' LlamaForCausalLM, fp32: every Llama version, both dialects, every layout."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distllm.engine import resolve_model
from distllm.parallel.layout import RankLayout
from tests.checkpoints import make_llama
from tests.unit.models.stepping import run_layout

TOLERANCE = 2e-4
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama2": {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 3},
    "llama3": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "vocab_size": 257},
    "llama3.1": {"rope_parameters": LLAMA3_SCALING, "vocab_size": 101},
    "llama3.2": {"rope_parameters": LLAMA3_SCALING, "tie_word_embeddings": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
    "biases": {"attention_bias": True, "mlp_bias": True, "vocab_size": 67},
    "head_dim": {"hidden_size": 40, "head_dim": 12, "intermediate_size": 53, "vocab_size": 7},
    "eps": {"rms_norm_eps": 0.05},
}
GRIDS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]


def texts_for(vocab_size: int) -> list[list[int]]:
    """Rows of odd lengths; one token, and one longer than the original window of the scaled variants."""
    rng = random.Random(vocab_size)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in (1, 19, 83, 40)]


def max_error(folder: Path, model: Any, tp_size: int, pp_size: int, seed: int = 0) -> float:
    texts = texts_for(model.config.vocab_size)
    with torch.no_grad():
        wanted = [model(torch.tensor([text])).logits[0] for text in texts]
    found = run_layout(folder, RankLayout(tp_size, pp_size), texts, seed)
    return max(float((a - b).abs().max()) for a, b in zip(wanted, found, strict=True))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    root = tmp_path_factory.mktemp("llamas")
    made = {}
    for number, (name, options) in enumerate(VARIANTS.items()):
        made[name] = (root / name, make_llama(root / name, seed=number, **options))
    return made


@pytest.mark.parametrize("name", VARIANTS)
def test_one_rank(checkpoints: dict[str, tuple[Path, Any]], name: str) -> None:
    assert max_error(*checkpoints[name], 1, 1) <= TOLERANCE


@pytest.mark.parametrize(("tp_size", "pp_size"), GRIDS[1:])
@pytest.mark.parametrize("name", ["llama3", "llama3.2", "biases", "head_dim"])
def test_layouts(checkpoints: dict[str, tuple[Path, Any]], name: str, tp_size: int, pp_size: int) -> None:
    assert max_error(*checkpoints[name], tp_size, pp_size, seed=tp_size + 10 * pp_size) <= TOLERANCE


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp_size"), [(6, 3, 3), (3, 3, 3), (6, 1, 3), (4, 1, 4), (8, 4, 2), (6, 2, 6)]
)
def test_odd_sizes(tmp_path: Path, heads: int, kv_heads: int, tp_size: int) -> None:
    """Three ranks, one KV head for all, widths that no rank count divides."""
    sizes = {"hidden_size": 48, "intermediate_size": 61, "vocab_size": 59, "num_hidden_layers": 3}
    model = make_llama(
        tmp_path, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=10, **sizes
    )
    assert max_error(tmp_path, model, tp_size, 1) <= TOLERANCE


def test_a_rank_without_vocabulary(tmp_path: Path) -> None:
    """Five entries on four ranks: two, two, one, and a rank that holds padding alone."""
    model = make_llama(tmp_path, vocab_size=5, tie_word_embeddings=True)
    assert max_error(tmp_path, model, 4, 1) <= TOLERANCE


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
@pytest.mark.parametrize("name", ["llama2", "llama3", "llama3.1", "linear"])
def test_dialect_of_transformers_4(
    checkpoints: dict[str, tuple[Path, Any]], tmp_path: Path, name: str, type_key: str
) -> None:
    """The same weights under a config.json as older releases, and the files on model hubs, have it."""
    folder, model = checkpoints[name]
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["torch_dtype"] = config.pop("dtype")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {type_key: kind, **rope}
    if name == "llama2":  # the oldest files have neither key
        del config["rope_theta"], config["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "model.safetensors", tmp_path)
    assert max_error(tmp_path, model, 1, 1) <= TOLERANCE


def test_pipeline_stages_change_no_bit(checkpoints: dict[str, tuple[Path, Any]]) -> None:
    """Only a sum over tensor-parallel ranks may round differently; a cut between layers may not."""
    folder, model = checkpoints["llama3"]
    texts = texts_for(model.config.vocab_size)
    one, four = (run_layout(folder, RankLayout(1, pp_size), texts) for pp_size in (1, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, four, strict=True))


def test_bfloat16_follows_transformers(tmp_path: Path) -> None:
    """As near to fp32 as transformers in bf16: the two round alike but for rope, ours in fp32."""
    model = make_llama(tmp_path, num_hidden_layers=2)
    texts = texts_for(model.config.vocab_size)
    with torch.no_grad():
        wanted = model(torch.tensor([texts[2]])).logits[0]
        theirs = (model.bfloat16()(torch.tensor([texts[2]])).logits[0].float() - wanted).abs().mean()
    ours = run_layout(tmp_path, RankLayout(), texts, dtype=torch.bfloat16)[2]
    assert (ours - wanted).abs().mean() <= 1.2 * theirs


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("name", ["demo", "demo-draft"])
def test_bundled_models(name: str, tp_size: int, pp_size: int) -> None:
    """The trained weights, bf16 on disk, computed in fp32 by both."""
    from transformers import LlamaForCausalLM

    folder = resolve_model(name)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert max_error(folder, model, tp_size, pp_size) <= TOLERANCE
