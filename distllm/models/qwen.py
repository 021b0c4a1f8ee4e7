"""Qwen, the first generation."""

from __future__ import annotations

from typing import Any

from distllm.models.checks import check_int
from distllm.models.family import Family
from distllm.models.hf_config import read_flag, refuse, renamed, require
from distllm.models.llama import read_llama_like
from distllm.models.sources import QKV, Stored, stacked_qkv
from distllm.models.spec import DecoderSpec

NAMES = {
    "kv_channels": "head_dim",
    "layer_norm_epsilon": "rms_norm_eps",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
    # Of the first revisions.
    "ffn_hidden_size": "intermediate_size",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "padded_vocab_size": "vocab_size",
}

# Both begin beyond seq_length, where the first turns all keys by the length that a sequence has reached: the
# cached ones of a growing sequence would need to be computed again.
TRICKS = ("use_dynamic_ntk", "use_logn_attn")


def read_config(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, reads=TRICKS)
    config = {"torch_dtype": "bfloat16", **renamed(config, NAMES)}  # files do not say it
    require(config, "kv_channels")
    width, bias = require(config, "intermediate_size"), not read_flag(config, "no_bias", True)
    check_int("intermediate_size", width, 2, 2**20)
    window = _window(config)
    return read_llama_like(
        config
        | {"intermediate_size": width // 2, "max_position_embeddings": window, "num_key_value_heads": None},
        "qwen",
        qkv_bias=True,
        out_bias=bias,
        mlp_bias=bias,
    )


def _window(config: dict[str, Any]) -> Any:
    """The longest sequence that needs no trick."""
    tricks = [read_flag(config, key, False) for key in TRICKS]
    return require(config, "seq_length" if any(tricks) else "max_position_embeddings")


SLOTS: dict[str, str | Stored] = {
    "embed": "transformer.wte",
    "layers.{n}.attn_norm": "transformer.h.{n}.ln_1",
    **dict.fromkeys(QKV, Stored(("transformer.h.{n}.attn.c_attn",), stacked_qkv)),
    "layers.{n}.attn.o": "transformer.h.{n}.attn.c_proj",
    "layers.{n}.mlp_norm": "transformer.h.{n}.ln_2",
    "layers.{n}.mlp.gate": "transformer.h.{n}.mlp.w2",  # the second of the two is activated
    "layers.{n}.mlp.up": "transformer.h.{n}.mlp.w1",
    "layers.{n}.mlp.down": "transformer.h.{n}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
QWEN = Family("qwen", ("QWenLMHeadModel",), read_config, SLOTS, models="Qwen: 1.8B, 7B, 14B, 72B")
