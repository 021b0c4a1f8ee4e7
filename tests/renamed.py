"""Checkpoints in layouts for which transformers has no class: those of another with the same maths, under
their own names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Renaming:
    """From what transformers saves of a model to the same model in a layout of its own."""

    config: Callable[[Config], Config]
    tensors: Callable[[Tensors], Tensors]

    def save(self, source: Path, to: Path) -> None:
        """Another folder, since tensors may be views of the file."""
        config = self.config(json.loads((source / "config.json").read_text()))
        (to / "config.json").write_text(json.dumps(config))
        save_file(self.tensors(load_file(source / "model.safetensors")), to / "model.safetensors")


def _chatglm_config(glm: Config) -> Config:
    """With the keys of chatglm3-6b and glm-4-9b that count."""
    return {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "num_layers": glm["num_hidden_layers"],
        "padded_vocab_size": glm["vocab_size"],
        "hidden_size": glm["hidden_size"],
        "ffn_hidden_size": glm["intermediate_size"],
        "num_attention_heads": glm["num_attention_heads"],
        "multi_query_attention": True,
        "multi_query_group_num": glm["num_key_value_heads"],
        "kv_channels": glm["head_dim"],
        "seq_length": glm["max_position_embeddings"],
        "layernorm_epsilon": glm["rms_norm_eps"],
        "rope_ratio": glm["rope_parameters"]["rope_theta"] / 1e4,
        "add_qkv_bias": glm["attention_bias"],
        "torch_dtype": glm["dtype"],
        "eos_token_id": glm["eos_token_id"],
    }


_CHATGLM_NAMES = {
    r"model\.embed_tokens": "transformer.embedding.word_embeddings",
    r"model\.layers": "transformer.encoder.layers",
    r"self_attn\.o_proj": "self_attention.dense",
    r"mlp\.gate_up_proj": "mlp.dense_h_to_4h",
    r"mlp\.down_proj": "mlp.dense_4h_to_h",
    r"model\.norm": "transformer.encoder.final_layernorm",
    r"lm_head": "transformer.output_layer",
}


def _chatglm_tensors(glm: Tensors) -> Tensors:
    """All q heads, all k, all v in one tensor; the rest has other names alone."""
    found = {}
    for name, tensor in glm.items():
        if match := re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", name):
            parts = [glm[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            fused = "transformer.encoder.layers.{}.self_attention.query_key_value.{}".format(*match.groups())
            found[fused] = torch.cat(parts)
        elif not re.search(r"self_attn\.[kv]_proj", name):
            found[_with_names(name, _CHATGLM_NAMES)] = tensor
    return found


def _with_names(name: str, names: dict[str, str]) -> str:
    for pattern, new in names.items():
        name = re.sub(pattern, new, name)
    return name


CHATGLM = Renaming(_chatglm_config, _chatglm_tensors)  # of Glm, whose maths are those of ChatGLM2 and 3
