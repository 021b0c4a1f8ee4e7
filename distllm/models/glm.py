"""GLM-4-9B in transformers' own layout, and GLM-4-0414 with its norms after attention and MLP."""

from __future__ import annotations

from distllm.models.llama import LLAMA
from distllm.models.sources import GATE_UP, Stored, gate_up

SLOTS = {
    **LLAMA.slots,  # post_attention_layernorm comes before the MLP here, too
    **dict.fromkeys(GATE_UP, Stored(("model.layers.{n}.mlp.gate_up_proj",), gate_up)),
    "layers.{n}.attn_post_norm": "model.layers.{n}.post_self_attn_layernorm",
    "layers.{n}.mlp_post_norm": "model.layers.{n}.post_mlp_layernorm",
}
