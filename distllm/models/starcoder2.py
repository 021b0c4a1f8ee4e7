"""StarCoder2: layer norms, biases everywhere, a plain MLP."""

from __future__ import annotations

from typing import Any

from distllm.models.checks import check_choice
from distllm.models.family import Family
from distllm.models.hf_config import read_activation, read_windows, refuse, require
from distllm.models.llama import LLAMA, read_llama_like
from distllm.models.spec import DecoderSpec, NormSpec


def read_config(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, reads=("sliding_window", "norm_type"))
    check_choice("norm_type", config.get("norm_type", "layer_norm"), ("layer_norm",))
    check_choice("mlp_type", config.get("mlp_type", "default"), ("default",))
    bias = config.get("use_bias", True)
    return read_llama_like(
        config,
        "starcoder2",
        norm=NormSpec("layer", require(config, "norm_epsilon")),
        activation=read_activation({"hidden_act": "gelu_pytorch_tanh", **config}),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        windows=read_windows(config, config.get("sliding_window"), lambda layer: True),
        tied_embeddings=config.get("tie_word_embeddings", True),  # the released files omit it
    )


STARCODER2 = Family(
    "starcoder2",
    ("Starcoder2ForCausalLM",),
    read_config,
    slots={
        **LLAMA.slots,
        "layers.{n}.mlp.up": "model.layers.{n}.mlp.c_fc",
        "layers.{n}.mlp.down": "model.layers.{n}.mlp.c_proj",
    },
    models="StarCoder2: 3B, 7B, 15B",
)
