"""GLM-4-9B in transformers' own layout, and GLM-4-0414 with norms after attention and MLP, too.

Of each head one half turns, in pairs of neighbours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from distllm.models.family import Family
from distllm.models.hf_config import refuse
from distllm.models.hf_rope import read_rope
from distllm.models.llama import LLAMA, read_llama_like
from distllm.models.sources import GATE_UP, Stored, gate_up
from distllm.models.spec import DecoderSpec

DEFAULTS = {"head_dim": 128, "num_key_value_heads": 2, "attention_bias": True, "partial_rotary_factor": 0.5}
SLOTS = {
    **LLAMA.slots,  # post_attention_layernorm comes before the MLP here, too
    **dict.fromkeys(GATE_UP, Stored(("model.layers.{n}.mlp.gate_up_proj",), gate_up)),
    "layers.{n}.attn_post_norm": "model.layers.{n}.post_self_attn_layernorm",
    "layers.{n}.mlp_post_norm": "model.layers.{n}.post_mlp_layernorm",
}


def _read(config: dict[str, Any], family: str, post_norms: bool) -> DecoderSpec:
    refuse(config, reads=("attention_bias",))
    config = {**DEFAULTS, **config}
    rope = replace(read_rope(config), interleaved=True)
    bias = config["attention_bias"]
    return read_llama_like(config, family, rope=rope, qkv_bias=bias, post_norms=post_norms)


GLM = Family(
    "glm",
    ("GlmForCausalLM",),
    lambda config: _read(config, "glm", post_norms=False),
    SLOTS,
    models="GLM-4-9B-hf, GLM-Edge: 1.5B, 4B, 9B",
    notes="glm-4-9b-chat-hf says rope_theta 10000, the same model as chatglm 5000000; both as written",
)
GLM4 = Family(
    "glm4",
    ("Glm4ForCausalLM",),
    lambda config: _read(config, "glm4", post_norms=True),
    SLOTS,
    models="GLM-4-0414, GLM-Z1-0414: 9B, 32B",
)
