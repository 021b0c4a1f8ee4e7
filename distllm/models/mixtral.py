"""Mixtral: Mistral with experts in place of the MLP; a token's shares of them sum to 1."""

from __future__ import annotations

from typing import Any

from distllm.models.family import Family
from distllm.models.hf_config import read_windows, refuse, require
from distllm.models.llama import LLAMA, read_llama_like
from distllm.models.moe_spec import MoESpec
from distllm.models.spec import DecoderSpec


def read_config(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, reads=("sliding_window", "num_local_experts"))
    moe = MoESpec(
        num_experts=require(config, "num_local_experts"),
        top_k=require(config, "num_experts_per_tok"),
        intermediate_size=require(config, "intermediate_size"),
        renormalize=True,
    )
    windows = read_windows(config, config.get("sliding_window"), lambda layer: True)
    return read_llama_like(config, "mixtral", moe=moe, windows=windows)


MIXTRAL = Family(
    "mixtral",
    ("MixtralForCausalLM",),
    read_config,
    slots={
        **LLAMA.slots,
        "layers.{n}.moe.router": "model.layers.{n}.block_sparse_moe.gate",
        "layers.{n}.moe.experts.{e}.gate": "model.layers.{n}.block_sparse_moe.experts.{e}.w1",
        "layers.{n}.moe.experts.{e}.up": "model.layers.{n}.block_sparse_moe.experts.{e}.w3",
        "layers.{n}.moe.experts.{e}.down": "model.layers.{n}.block_sparse_moe.experts.{e}.w2",
    },
    models="Mixtral: 8x7B, 8x22B",
)
