"""Qwen2 and 2.5: Llama with a bias on q, k and v alone, and a window on the upper layers if it is on."""

from __future__ import annotations

from typing import Any

from distllm.models.checks import check_int
from distllm.models.family import Family
from distllm.models.hf_config import read_windows, refuse, require
from distllm.models.llama import LLAMA, read_llama_like
from distllm.models.spec import DecoderSpec


def read_upper_windows(config: dict[str, Any]) -> tuple[int, ...]:
    """sliding_window counts only with use_sliding_window, and from layer max_window_layers on."""
    if not config.get("use_sliding_window"):
        return read_windows(config, None, lambda layer: False)
    first = require(config, "max_window_layers")
    check_int("max_window_layers", first, 0, 2**12)
    return read_windows(config, config.get("sliding_window"), lambda layer: bool(layer >= first))


def read_config(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, reads=("sliding_window", "use_sliding_window"))
    return read_llama_like(config, "qwen2", qkv_bias=True, windows=read_upper_windows(config))


QWEN2 = Family(
    "qwen2",
    ("Qwen2ForCausalLM",),
    read_config,
    slots=LLAMA.slots,
    models="Qwen1.5, Qwen2, Qwen2.5, QwQ: 0.5B to 72B",
)
