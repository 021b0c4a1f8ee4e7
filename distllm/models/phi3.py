"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama with a window on every layer, q, k and v in one tensor, and
gate and up in one.
"""

from __future__ import annotations

from typing import Any

from distllm.models.family import Family
from distllm.models.hf_config import read_windows, refuse
from distllm.models.llama import LLAMA, read_llama_like
from distllm.models.sources import GATE_UP, QKV, Stored, gate_up, stacked_qkv
from distllm.models.spec import DecoderSpec


def read_config(config: dict[str, Any]) -> DecoderSpec:
    refuse(config, reads=("sliding_window",))
    windows = read_windows(config, config.get("sliding_window"), lambda layer: True)
    return read_llama_like(config, "phi3", windows=windows)


PHI3 = Family(
    "phi3",
    ("Phi3ForCausalLM",),
    read_config,
    slots={
        **LLAMA.slots,
        **dict.fromkeys(QKV, Stored(("model.layers.{n}.self_attn.qkv_proj",), stacked_qkv)),
        **dict.fromkeys(GATE_UP, Stored(("model.layers.{n}.mlp.gate_up_proj",), gate_up)),
    },
    models="Phi-3 mini and medium, Phi-3.5-mini, Phi-4, Phi-4-mini: 3.8B, 14B",
    notes="longrope goes by max_model_len: adding-a-model.md",
)
