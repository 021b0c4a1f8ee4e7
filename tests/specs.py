"""Specs for tests that load no model."""

from __future__ import annotations

from typing import Any

from distllm.models.rope_spec import RopeSpec
from distllm.models.spec import DecoderSpec, NormSpec


def llama_spec(**changes: Any) -> DecoderSpec:
    """Llama's knobs at a tiny size, but for the changes."""
    fields: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 50,
        "hidden_size": 24,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 6,
        "intermediate_size": 40,
        "activation": "silu",
        "norm": NormSpec("rms", 1e-5),
        "rope": RopeSpec(10000.0),
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "tied_embeddings": False,
        "max_position_embeddings": 128,
        "dtype": "float32",
    }
    return DecoderSpec(**fields | changes)
