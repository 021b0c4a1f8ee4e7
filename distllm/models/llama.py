"""Llama 2, 3, 3.1 and 3.2, and whatever else names its architecture LlamaForCausalLM."""

from __future__ import annotations

from typing import Any

from distllm.models.family import Family
from distllm.models.hf_config import read_dtype, read_head_dim, read_rope, refuse, require
from distllm.models.spec import DecoderSpec

# Keys that would change the result, with the values under which they do not.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
    "num_experts": (None,),
    "num_local_experts": (None,),
}


def read_config(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, NEUTRAL)
    num_heads = require(config, "num_attention_heads")
    num_kv_heads = config.get("num_key_value_heads")  # absent in Llama 2 files without grouped queries
    attention_bias = config.get("attention_bias", False)
    return DecoderSpec(
        family="llama",
        vocab_size=require(config, "vocab_size"),
        hidden_size=require(config, "hidden_size"),
        num_layers=require(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=read_head_dim(config),
        intermediate_size=require(config, "intermediate_size"),
        activation="silu",
        norm_eps=require(config, "rms_norm_eps"),
        rope=read_rope(config),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=config.get("mlp_bias", False),
        tied_embeddings=config.get("tie_word_embeddings", False),
        max_position_embeddings=require(config, "max_position_embeddings"),
        dtype=read_dtype(config),
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
)
