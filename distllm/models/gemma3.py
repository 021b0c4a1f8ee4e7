"""Gemma 3, the language model: Gemma 2 with norms on q and k in place of softcaps, and two ropes.

Files of models that see images hold it as text_config and `language_model.*`; the rest is not read.
"""

from __future__ import annotations

import reprlib
from typing import Any

from distllm.errors import CheckpointError
from distllm.models.checks import check_int
from distllm.models.family import Family
from distllm.models.gemma2 import GEMMA2, READS, read_gemma
from distllm.models.hf_config import read_windows, refuse
from distllm.models.hf_rope import read_ropes_by_layer
from distllm.models.sources import Stored
from distllm.models.spec import DecoderSpec

# What the released text_configs leave out.
DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
}
OF_BOTH = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")  # written beside text_config


def read_config(config: dict[str, Any]) -> DecoderSpec:
    config = _text_config(config) if "text_config" in config else config
    refuse(config, reads=(*READS, "rope_local_base_freq", "sliding_window_pattern"))
    every = config.get("sliding_window_pattern", 6)
    check_int("sliding_window_pattern", every, 1, 2**12)
    windows = read_windows(config, config.get("sliding_window", 4096), lambda layer: (layer + 1) % every > 0)
    rope, window_rope = read_ropes_by_layer(config, theta=1e6)
    return read_gemma(
        config, "gemma3_text", windows=windows, rope=rope, window_rope=window_rope, qk_norm=True
    )


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    text = config["text_config"]
    if not isinstance(text, dict):
        raise CheckpointError(f"text_config is {reprlib.repr(text)}; it must be an object")
    return DEFAULTS | {key: config[key] for key in OF_BOTH if key in config} | text


SLOTS = {
    **GEMMA2.slots,
    "layers.{n}.attn.q_norm": "model.layers.{n}.self_attn.q_norm",
    "layers.{n}.attn.k_norm": "model.layers.{n}.self_attn.k_norm",
}
GEMMA3 = Family(
    "gemma3_text",
    ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    read_config,
    slots={slot: Stored((str(name), f"language_model.{name}")) for slot, name in SLOTS.items()},
    models="Gemma 3: 270M, 1B; of 4B, 12B and 27B the text",
)
