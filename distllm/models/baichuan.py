"""Baichuan and Baichuan2, 7B and 13B: Llama's names, but for q, k and v in one tensor."""

from __future__ import annotations

from distllm.models.llama import LLAMA
from distllm.models.sources import QKV, Stored, stacked_qkv

SLOTS = {
    **LLAMA.slots,
    **dict.fromkeys(QKV, Stored(("model.layers.{n}.self_attn.W_pack",), stacked_qkv)),
}
