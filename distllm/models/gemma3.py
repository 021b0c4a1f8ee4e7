"""Gemma 3, the language model: Gemma 2 with norms on q and k in place of softcaps, and two ropes."""

from __future__ import annotations

from typing import Any

from distllm.models.checks import check_int
from distllm.models.family import Family
from distllm.models.gemma2 import GEMMA2, READS, read_gemma
from distllm.models.hf_config import read_windows, refuse
from distllm.models.hf_rope import read_ropes_by_layer
from distllm.models.spec import DecoderSpec


def read_config(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, reads=(*READS, "rope_local_base_freq", "sliding_window_pattern"))
    every = config.get("sliding_window_pattern", 6)
    check_int("sliding_window_pattern", every, 1, 2**12)
    windows = read_windows(config, config.get("sliding_window", 4096), lambda layer: (layer + 1) % every > 0)
    rope, window_rope = read_ropes_by_layer(config, theta=1e6)
    return read_gemma(
        config, "gemma3_text", windows=windows, rope=rope, window_rope=window_rope, qk_norm=True
    )


GEMMA3 = Family(
    "gemma3_text",
    ("Gemma3ForCausalLM",),
    read_config,
    slots={
        **GEMMA2.slots,
        "layers.{n}.attn.q_norm": "model.layers.{n}.self_attn.q_norm",
        "layers.{n}.attn.k_norm": "model.layers.{n}.self_attn.k_norm",
    },
    models="Gemma 3, text: 270M, 1B",
)
