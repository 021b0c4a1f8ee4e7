"""Gemma 2: norms around each block with gains of 1 + w, softcaps, a window on every other layer."""

from __future__ import annotations

from typing import Any

from distllm.models.checks import check_int, check_number
from distllm.models.family import Family
from distllm.models.hf_config import read_activation, read_windows, refuse, require
from distllm.models.llama import LLAMA, read_llama_like
from distllm.models.spec import DecoderSpec, NormSpec

READS = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar")


def read_gemma(config: dict[str, Any], family: str, **knobs: Any) -> DecoderSpec:
    """What Gemma 2 and 3 share. hidden_act is there for older programs: hidden_activation counts."""
    hidden, scalar = require(config, "hidden_size"), config.get("query_pre_attn_scalar", 256)
    check_int("hidden_size", hidden, 1, 2**18)
    check_number("query_pre_attn_scalar", scalar, 1.0, 1e6)
    return read_llama_like(
        {"head_dim": 256, **config},
        family,
        activation=read_activation({"hidden_activation": "gelu_pytorch_tanh", **config}, "hidden_activation"),
        norm=NormSpec("rms", require(config, "rms_norm_eps"), plus_one=True),
        post_norms=True,
        attention_scale=scalar**-0.5,
        attention_softcap=config.get("attn_logit_softcapping") or 0.0,
        embedding_scale=hidden**0.5,
        logit_softcap=config.get("final_logit_softcapping") or 0.0,
        tied_embeddings=config.get("tie_word_embeddings", True),  # files omit it
        **knobs,
    )


def read_config(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, reads=READS)
    with_caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **config}
    windows = read_windows(config, config.get("sliding_window", 4096), lambda layer: layer % 2 == 0)
    return read_gemma(with_caps, "gemma2", windows=windows)


GEMMA2 = Family(
    "gemma2",
    ("Gemma2ForCausalLM",),
    read_config,
    slots={
        **LLAMA.slots,
        "layers.{n}.attn_post_norm": "model.layers.{n}.post_attention_layernorm",
        "layers.{n}.mlp_norm": "model.layers.{n}.pre_feedforward_layernorm",
        "layers.{n}.mlp_post_norm": "model.layers.{n}.post_feedforward_layernorm",
    },
    models="Gemma 2: 2B, 9B, 27B",
)
