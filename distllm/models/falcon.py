"""Falcon: 7B, the new decoder of 40B, 180B and 11B, and RW.

Their fused q, k and v are one layout: 7B has one KV head, RW as many as query heads.
"""

from __future__ import annotations

from distllm.models.sources import QKV, Stored, grouped_qkv

_LAYER = "transformer.h.{n}"
SLOTS = {
    "embed": "transformer.word_embeddings",
    "layers.{n}.attn_norm": Stored((f"{_LAYER}.ln_attn", f"{_LAYER}.input_layernorm")),
    **dict.fromkeys(QKV, Stored((f"{_LAYER}.self_attention.query_key_value",), grouped_qkv)),
    "layers.{n}.attn.o": f"{_LAYER}.self_attention.dense",
    "layers.{n}.mlp_norm": Stored((f"{_LAYER}.ln_mlp", f"{_LAYER}.post_attention_layernorm")),
    "layers.{n}.mlp.up": f"{_LAYER}.mlp.dense_h_to_4h",
    "layers.{n}.mlp.down": f"{_LAYER}.mlp.dense_4h_to_h",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
