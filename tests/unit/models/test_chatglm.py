"""ChatGLM's own tensors and keys read by a decoder on paper, fp64: the second reference of a layout for which
transformers has no class. Written from the layout; shares no code with what it judges.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import silu

from distllm.parallel.layout import RankLayout
from tests.unit.models.stepping import run_layout

LAYER = "transformer.encoder.layers"
CONFIG = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "num_layers": 3,
    "padded_vocab_size": 61,
    "hidden_size": 28,
    "ffn_hidden_size": 35,
    "num_attention_heads": 8,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "kv_channels": 12,
    "seq_length": 64,
    "layernorm_epsilon": 1e-3,
    "add_qkv_bias": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "chatglm3-6b": {},
    "glm-4-9b-chat-1m": {"multi_query_group_num": 4, "rope_ratio": 10000},
    "no biases": {"add_qkv_bias": False, "rope_ratio": 50},
    "all biases": {"add_qkv_bias": False, "add_bias_linear": True, "multi_query_group_num": 1},
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, width, head = config["hidden_size"], config["ffn_hidden_size"], config["kv_channels"]
    q, kv = config["num_attention_heads"] * head, config["multi_query_group_num"] * head
    every, biases = config.get("add_bias_linear", False), {}
    of_layer = {
        "self_attention.query_key_value": (q + 2 * kv, hidden),
        "self_attention.dense": (hidden, q),
        "mlp.dense_h_to_4h": (2 * width, hidden),
        "mlp.dense_4h_to_h": (hidden, width),
    }
    for name, shape in of_layer.items():
        if every or (config["add_qkv_bias"] and "query" in name):
            biases[f"{name}.bias"] = shape[:1]
    linears = {f"{name}.weight": shape for name, shape in of_layer.items()} | biases
    norms = {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return {
        "transformer.embedding.word_embeddings.weight": (config["padded_vocab_size"], hidden),
        **{f"{LAYER}.{n}.{k}": v for n in range(config["num_layers"]) for k, v in (linears | norms).items()},
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (config["padded_vocab_size"], hidden),
    }


class PlainChatGLM:
    def __init__(self, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.config, self.tensors = config, {name: tensor.double() for name, tensor in tensors.items()}

    def logits(self, text: list[int]) -> torch.Tensor:
        x = self.tensors["transformer.embedding.word_embeddings.weight"][text]
        for n in range(self.config["num_layers"]):
            x = x + self.attention(
                f"{LAYER}.{n}.self_attention", self.norm(f"{LAYER}.{n}.input_layernorm", x)
            )
            x = x + self.mlp(f"{LAYER}.{n}.mlp", self.norm(f"{LAYER}.{n}.post_attention_layernorm", x))
        return self.linear("transformer.output_layer", self.norm("transformer.encoder.final_layernorm", x))

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The first group of query heads reads the first KV head, and so on."""
        heads, groups, dim = (
            self.config[key] for key in ("num_attention_heads", "multi_query_group_num", "kv_channels")
        )
        mixed = self.linear(f"{name}.query_key_value", x)
        rows = [mixed[:, at * dim : (at + 1) * dim] for at in range(heads + 2 * groups)]
        q, k, v = rows[:heads], rows[heads : heads + groups], rows[heads + groups :]
        future = torch.full((len(x), len(x)), -math.inf, dtype=torch.float64).triu(1)
        contexts = []
        for head in range(heads):
            group = head // (heads // groups)
            scores = self.turned(q[head]) @ self.turned(k[group]).T / math.sqrt(dim) + future
            contexts.append(scores.softmax(-1) @ v[group])
        return self.linear(f"{name}.dense", torch.cat(contexts, -1))

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """Neighbours (0, 1), (2, 3), … of the first half of a head, one pair and position after another."""
        out, rotary = x.clone(), self.config["kv_channels"] // 2
        base = 10000.0 * self.config.get("rope_ratio", 1)
        for position in range(len(x)):
            for i in range(0, rotary, 2):
                angle = position / base ** (i / rotary)
                turn = torch.tensor(
                    [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
                ).double()
                out[position, i : i + 2] = turn @ x[position, i : i + 2]
        return out

    def mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        first, second = self.linear(f"{name}.dense_h_to_4h", x).chunk(2, -1)
        return self.linear(f"{name}.dense_4h_to_h", silu(first) * second)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        mean = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean + self.config["layernorm_epsilon"]) * self.tensors[f"{name}.weight"]


@pytest.mark.parametrize("name", VARIANTS)
def test_logits(name: str, tmp_path: Path) -> None:
    rng, config = random.Random(name), CONFIG | VARIANTS[name]
    torch.manual_seed(len(name))
    tensors = {
        at: torch.randn(shape) * 0.2 + ("norm" in at and at.endswith("weight"))
        for at, shape in shapes(config).items()
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    texts = [[rng.randrange(61) for _ in range(length)] for length in (1, 9, 34)]
    wanted = [PlainChatGLM(config, tensors).logits(text) for text in texts]
    for layout in RankLayout(), RankLayout(2, 2), RankLayout(4):
        found = run_layout(tmp_path, layout, texts)
        assert max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) <= 2e-4
