"""Qwen, the first generation."""

from __future__ import annotations

from distllm.models.sources import QKV, Stored, stacked_qkv

SLOTS = {
    "embed": "transformer.wte",
    "layers.{n}.attn_norm": "transformer.h.{n}.ln_1",
    **dict.fromkeys(QKV, Stored(("transformer.h.{n}.attn.c_attn",), stacked_qkv)),
    "layers.{n}.attn.o": "transformer.h.{n}.attn.c_proj",
    "layers.{n}.mlp_norm": "transformer.h.{n}.ln_2",
    "layers.{n}.mlp.gate": "transformer.h.{n}.mlp.w2",  # the second of the two is activated
    "layers.{n}.mlp.up": "transformer.h.{n}.mlp.w1",
    "layers.{n}.mlp.down": "transformer.h.{n}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
