"""Qwen3: Qwen2 with norms on the heads of q and k in place of biases; heads of 128 whatever their number."""

from __future__ import annotations

from typing import Any

from distllm.models.family import Family
from distllm.models.hf_config import refuse
from distllm.models.llama import LLAMA, read_llama_like
from distllm.models.qwen2 import read_upper_windows
from distllm.models.spec import DecoderSpec


def read_config(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, reads=("sliding_window", "use_sliding_window", "attention_bias"))
    bias = config.get("attention_bias", False)
    return read_llama_like(
        {"head_dim": 128, **config},
        "qwen3",
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        windows=read_upper_windows(config),
    )


QWEN3 = Family(
    "qwen3",
    ("Qwen3ForCausalLM",),
    read_config,
    slots={
        **LLAMA.slots,
        "layers.{n}.attn.q_norm": "model.layers.{n}.self_attn.q_norm",
        "layers.{n}.attn.k_norm": "model.layers.{n}.self_attn.k_norm",
    },
    models="Qwen3: 0.6B to 32B",
)
