"""Mistral: Llama with a sliding window on every layer."""

from __future__ import annotations

from typing import Any

from distllm.models.family import Family
from distllm.models.hf_config import read_windows, refuse
from distllm.models.llama import LLAMA, read_llama_like
from distllm.models.spec import DecoderSpec


def read_config(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, reads=("sliding_window",))
    window = config.get("sliding_window", 4096)  # null: none; absent: the first release's
    return read_llama_like(config, "mistral", windows=read_windows(config, window, lambda layer: True))


MISTRAL = Family(
    "mistral",
    ("MistralForCausalLM",),
    read_config,
    slots=LLAMA.slots,
    models="Mistral 7B, Mistral-Nemo 12B, Mistral-Small 22B, 24B",
)
