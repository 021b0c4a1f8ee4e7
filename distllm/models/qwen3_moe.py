"""Qwen3-MoE: Qwen3 with many narrow experts in place of the MLP, on all layers or some."""

from __future__ import annotations

import reprlib
from typing import Any

from distllm.errors import CheckpointError
from distllm.models.checks import check_int
from distllm.models.family import Family
from distllm.models.hf_config import refuse, require
from distllm.models.llama import read_llama_like
from distllm.models.moe_spec import MoESpec
from distllm.models.qwen3 import QWEN3
from distllm.models.spec import DecoderSpec


def read_config(config: dict[str, Any]) -> DecoderSpec:
    # sliding_window counts only with use_sliding_window, which no checkpoint has.
    reads = ("sliding_window", "attention_bias", "num_experts", "num_local_experts")
    refuse(config, reads=reads)
    bias = config.get("attention_bias", False)
    return read_llama_like(
        config, "qwen3_moe", qkv_bias=bias, out_bias=bias, qk_norm=True, moe=_read_experts(config)
    )


def _read_experts(config: dict[str, Any]) -> MoESpec:
    key = "num_local_experts" if "num_local_experts" in config else "num_experts"  # transformers 5; the hub
    return MoESpec(
        num_experts=require(config, key),
        top_k=require(config, "num_experts_per_tok"),
        intermediate_size=require(config, "moe_intermediate_size"),
        renormalize=config.get("norm_topk_prob", False),
        dense_layers=_read_dense_layers(config),
    )


def _read_dense_layers(config: dict[str, Any]) -> tuple[int, ...]:
    """Those that mlp_only_layers names, and all but every decoder_sparse_step-th."""
    named, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    if not isinstance(named, list):
        raise CheckpointError(f"mlp_only_layers is {reprlib.repr(named)}; it must be a list")
    num_layers = require(config, "num_hidden_layers")
    check_int("num_layers", num_layers, 1, 2**12)
    check_int("decoder_sparse_step", step, 1, 2**12)
    for layer in named:
        check_int("a layer of mlp_only_layers", layer, 0, num_layers - 1)
    return tuple(n for n in range(num_layers) if n in named or (n + 1) % step)


QWEN3_MOE = Family(
    "qwen3_moe",
    ("Qwen3MoeForCausalLM",),
    read_config,
    slots={
        **QWEN3.slots,
        "layers.{n}.moe.router": "model.layers.{n}.mlp.gate",
        "layers.{n}.moe.experts.{e}.gate": "model.layers.{n}.mlp.experts.{e}.gate_proj",
        "layers.{n}.moe.experts.{e}.up": "model.layers.{n}.mlp.experts.{e}.up_proj",
        "layers.{n}.moe.experts.{e}.down": "model.layers.{n}.mlp.experts.{e}.down_proj",
    },
    models="Qwen3: 30B-A3B, 235B-A22B",
)
