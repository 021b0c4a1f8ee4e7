"""Baichuan 13B on paper, fp64, from the tensors of its files: a reference besides transformers' classes."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distllm.parallel.layout import RankLayout
from tests.checkpoints import Tensors
from tests.unit.models.older_cases import OLDER_CASES
from tests.unit.models.stepping import run_layout

HEADS, EPS = 40, 1e-3


def logits_on_paper(tensors: Tensors, text: list[int], unit_head: bool) -> torch.Tensor:
    """[len(text), vocab_size]."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    x = t["model.embed_tokens.weight"][text]
    for layer in range(3):
        own = {name.partition(f".{layer}.")[2]: w for name, w in t.items() if f"layers.{layer}." in name}
        x = x + attention(normed(x, own["input_layernorm.weight"]), own) @ own["self_attn.o_proj.weight"].T
        h = normed(x, own["post_attention_layernorm.weight"])
        gate, up = h @ own["mlp.gate_proj.weight"].T, h @ own["mlp.up_proj.weight"].T
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ own["mlp.down_proj.weight"].T
    head = t["lm_head.weight"]
    if unit_head:
        head = torch.stack([row / math.sqrt(sum(row * row)) for row in head])
    return normed(x, t["model.norm.weight"]) @ head.T


def attention(x: torch.Tensor, own: Tensors) -> torch.Tensor:
    """The rows of W_pack: q of all heads, k of all, v of all."""
    n, size = x.shape
    q, k, v = (x @ own["self_attn.W_pack.weight"].T).view(n, 3, HEADS, size // HEADS).permute(1, 2, 0, 3)
    places = torch.arange(n)
    bias = torch.tensor(slopes(HEADS)).double()[:, None, None] * (places - places[:, None])
    scores = q @ k.mT / math.sqrt(size / HEADS) + bias
    scores[:, places > places[:, None]] = -math.inf
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, size)


def slopes(heads: int) -> list[float]:
    """As the authors of alibi wrote them: for other numbers, every second one of twice the power of two."""
    power = 2 ** int(math.log2(heads))
    if power == heads:
        return [2 ** (-8 / heads * (head + 1)) for head in range(heads)]
    return slopes(power) + slopes(2 * power)[::2][: heads - power]


def normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x / ((x * x).mean(1, keepdim=True) + EPS).sqrt() * gain


@pytest.mark.parametrize("layout", [(1, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("name", ["baichuan 13b", "baichuan2 13b"])
def test_logits(tmp_path: Path, name: str, layout: tuple[int, int]) -> None:
    OLDER_CASES[name].make(tmp_path, seed=7)
    tensors, rng = load_file(tmp_path / "model.safetensors"), random.Random(7)
    texts = [[rng.randrange(67) for _ in range(length)] for length in (1, 33, 90)]
    wanted = [logits_on_paper(tensors, text, name == "baichuan2 13b") for text in texts]
    found = run_layout(tmp_path, RankLayout(*layout), texts)
    assert max((a - b).abs().max() for a, b in zip(found, wanted, strict=True)) <= 2e-4
