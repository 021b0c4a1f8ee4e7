"""GPT-2, whose weights are stored [in, out]. The published files have no `transformer.` before names."""

from __future__ import annotations

from typing import Any

from distllm.models.family import Family
from distllm.models.hf_config import read_activation, read_flag, read_width, refuse, renamed, require
from distllm.models.llama import read_llama_like
from distllm.models.sources import QKV, Layout, Stored, stacked_qkv
from distllm.models.spec import DecoderSpec, NormSpec

NAMES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}


def read_config(config: dict[str, Any]) -> DecoderSpec:
    """reorder_and_upcast_attn says how to round, which is ours to choose."""
    refuse(config, reads=("scale_attn_weights",))
    config = renamed(config, NAMES)
    return read_llama_like(
        {**config, "num_key_value_heads": None, "intermediate_size": read_width(config, "n_inner")},
        "gpt2",
        norm=NormSpec("layer", require(config, "layer_norm_epsilon")),
        activation=read_activation(config, "activation_function"),
        gated=False,
        rope=None,
        learned_positions=0,
        attention_scale=None if read_flag(config, "scale_attn_weights", True) else 1.0,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_embeddings=config.get("tie_word_embeddings", True),
    )


def _named(name: str) -> Stored:
    return Stored((f"transformer.{name}", name))


def _conv1d(name: str, layout: Layout | None = None) -> Stored:
    return Stored((f"transformer.{name}", name), layout, transposed=True)


SLOTS: dict[str, str | Stored] = {
    "embed": _named("wte"),
    "positions": _named("wpe"),
    "layers.{n}.attn_norm": _named("h.{n}.ln_1"),
    **dict.fromkeys(QKV, _conv1d("h.{n}.attn.c_attn", stacked_qkv)),
    "layers.{n}.attn.o": _conv1d("h.{n}.attn.c_proj"),
    "layers.{n}.mlp_norm": _named("h.{n}.ln_2"),
    "layers.{n}.mlp.up": _conv1d("h.{n}.mlp.c_fc"),
    "layers.{n}.mlp.down": _conv1d("h.{n}.mlp.c_proj"),
    "final_norm": _named("ln_f"),
    "head": "lm_head",
}
GPT2 = Family("gpt2", ("GPT2LMHeadModel",), read_config, SLOTS, models="GPT-2: 124M to 1.5B")
