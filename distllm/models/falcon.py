"""Falcon: 7B, the new decoder of 40B, 180B and 11B, and RW.

Their fused q, k and v are one layout: 7B has one KV head, RW as many as query heads.
"""

from __future__ import annotations

from typing import Any, Literal

from distllm.models.checks import check_choice
from distllm.models.family import Family
from distllm.models.hf_config import (
    read_activation,
    read_flag,
    read_head_dim,
    read_width,
    refuse,
    renamed,
    require,
)
from distllm.models.hf_rope import read_rope
from distllm.models.llama import read_llama_like
from distllm.models.sources import QKV, Stored, grouped_qkv
from distllm.models.spec import DecoderSpec, NormSpec

NAMES = {  # of the first releases, RefinedWebModel (7B) and RefinedWeb (40B)
    "n_embed": "hidden_size",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
    "n_layer": "num_hidden_layers",
}


def read_config(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, reads=("alibi", "parallel_attn"))
    config = {"max_position_embeddings": 2048, **renamed(config, NAMES)}
    is_new = read_flag(config, "new_decoder_architecture", config.get("model_type") == "RefinedWeb")
    # 7B files may have a num_kv_heads, which counts for nothing.
    one_kv_head = not is_new and read_flag(config, "multi_query")
    alibi, bias = read_flag(config, "alibi", False), config.get("bias", False)
    kv_heads, width = 1 if one_kv_head else config.get("num_kv_heads"), read_width(config, "ffn_hidden_size")
    return read_llama_like(
        {**config, "num_key_value_heads": kv_heads, "intermediate_size": width},
        "falcon",
        norm=NormSpec("layer", require(config, "layer_norm_epsilon")),
        activation=read_activation({"activation": "gelu", **config}, "activation"),
        gated=False,
        residual=_residual(config, is_new),
        rope=None if alibi else read_rope(config),
        alibi_scale=read_head_dim(config) ** -0.5 if alibi else None,  # added before the scores are scaled
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tied_embeddings=config.get("tie_word_embeddings", True),
    )


def _residual(config: dict[str, Any], is_new: bool) -> Literal["sequential", "parallel", "parallel_shared"]:
    norms = config.get("num_ln_in_parallel_attn")
    check_choice("num_ln_in_parallel_attn", norms, (None, 1, 2) if is_new else (None, 1))
    if is_new:
        return "parallel_shared" if norms == 1 else "parallel"
    return "parallel_shared" if read_flag(config, "parallel_attn") else "sequential"


_LAYER = "transformer.h.{n}"
SLOTS: dict[str, str | Stored] = {
    "embed": "transformer.word_embeddings",
    "layers.{n}.attn_norm": Stored((f"{_LAYER}.ln_attn", f"{_LAYER}.input_layernorm")),
    **dict.fromkeys(QKV, Stored((f"{_LAYER}.self_attention.query_key_value",), grouped_qkv)),
    "layers.{n}.attn.o": f"{_LAYER}.self_attention.dense",
    "layers.{n}.mlp_norm": Stored((f"{_LAYER}.ln_mlp", f"{_LAYER}.post_attention_layernorm")),
    "layers.{n}.mlp.up": f"{_LAYER}.mlp.dense_h_to_4h",
    "layers.{n}.mlp.down": f"{_LAYER}.mlp.dense_4h_to_h",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
FALCON = Family(
    "falcon", ("FalconForCausalLM", "RWForCausalLM"), read_config, SLOTS, models="Falcon: 1B to 180B"
)
