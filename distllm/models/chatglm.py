"""ChatGLM2, ChatGLM3 and GLM-4-9B in the layout of their own code."""

from __future__ import annotations

from distllm.models.sources import GATE_UP, QKV, Stored, gate_up, stacked_qkv

_LAYER = "transformer.encoder.layers.{n}"
SLOTS = {
    "embed": "transformer.embedding.word_embeddings",
    "layers.{n}.attn_norm": f"{_LAYER}.input_layernorm",
    **dict.fromkeys(QKV, Stored((f"{_LAYER}.self_attention.query_key_value",), stacked_qkv)),
    "layers.{n}.attn.o": f"{_LAYER}.self_attention.dense",
    "layers.{n}.mlp_norm": f"{_LAYER}.post_attention_layernorm",
    **dict.fromkeys(GATE_UP, Stored((f"{_LAYER}.mlp.dense_h_to_4h",), gate_up)),
    "layers.{n}.mlp.down": f"{_LAYER}.mlp.dense_4h_to_h",
    "final_norm": "transformer.encoder.final_layernorm",
    "head": "transformer.output_layer",
}
