"""Phi-3, Phi-3.5 and Phi-4-mini: Llama's names, but for q, k and v in one tensor, and gate and up in one."""

from __future__ import annotations

from distllm.models.llama import LLAMA
from distllm.models.sources import GATE_UP, QKV, Stored, gate_up, stacked_qkv

SLOTS = {
    **LLAMA.slots,
    **dict.fromkeys(QKV, Stored(("model.layers.{n}.self_attn.qkv_proj",), stacked_qkv)),
    **dict.fromkeys(GATE_UP, Stored(("model.layers.{n}.mlp.gate_up_proj",), gate_up)),
}
