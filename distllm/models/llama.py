"""Llama 2, 3, 3.1 and 3.2, and what the families that grew from it share: its keys and its names."""

from __future__ import annotations

from typing import Any

from distllm.models.family import Family
from distllm.models.hf_config import read_activation, read_dtype, read_head_dim, read_windows, refuse, require
from distllm.models.hf_rope import read_max_positions, read_rope
from distllm.models.spec import DecoderSpec, NormSpec


def read_llama_like(config: dict[str, Any], family: str, **knobs: Any) -> DecoderSpec:
    """A spec from Llama's keys. knobs: fields of DecoderSpec that the family reads in its own way."""
    num_heads = require(config, "num_attention_heads")
    num_kv_heads = config.get("num_key_value_heads")  # absent in Llama 2 files without grouped queries
    rope = knobs.pop("rope") if "rope" in knobs else read_rope(config)
    norm = knobs.pop("norm", None) or NormSpec("rms", require(config, "rms_norm_eps"))
    activation = knobs.pop("activation", None) or read_activation({"hidden_act": "silu", **config})
    if "windows" not in knobs:
        knobs["windows"] = read_windows(config, None, lambda layer: False)
    biases = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}
    return DecoderSpec(
        family=family,
        vocab_size=require(config, "vocab_size"),
        hidden_size=require(config, "hidden_size"),
        num_layers=require(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=read_head_dim(config),
        intermediate_size=require(config, "intermediate_size"),
        activation=activation,
        norm=norm,
        rope=rope,
        max_position_embeddings=read_max_positions(config, rope),
        dtype=read_dtype(config),
        **{"tied_embeddings": config.get("tie_word_embeddings", False), **biases, **knobs},
    )


def read_config(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, reads=("attention_bias", "mlp_bias"))
    bias = config.get("attention_bias", False)
    return read_llama_like(
        config, "llama", qkv_bias=bias, out_bias=bias, mlp_bias=config.get("mlp_bias", False)
    )


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    read_config=read_config,
    slots={
        "embed": "model.embed_tokens",
        "layers.{n}.attn_norm": "model.layers.{n}.input_layernorm",
        "layers.{n}.attn.q": "model.layers.{n}.self_attn.q_proj",
        "layers.{n}.attn.k": "model.layers.{n}.self_attn.k_proj",
        "layers.{n}.attn.v": "model.layers.{n}.self_attn.v_proj",
        "layers.{n}.attn.o": "model.layers.{n}.self_attn.o_proj",
        "layers.{n}.mlp_norm": "model.layers.{n}.post_attention_layernorm",
        "layers.{n}.mlp.gate": "model.layers.{n}.mlp.gate_proj",
        "layers.{n}.mlp.up": "model.layers.{n}.mlp.up_proj",
        "layers.{n}.mlp.down": "model.layers.{n}.mlp.down_proj",
        "final_norm": "model.norm",
        "head": "lm_head",
    },
    models="Llama 1, 2, 3, 3.1, 3.2 (text), 3.3: 1B to 405B; and what shares their layout",
)
