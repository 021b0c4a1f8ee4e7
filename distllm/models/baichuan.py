"""Baichuan and Baichuan2, 7B and 13B: Llama's names, but for q, k and v in one tensor.

No key of config.json says which of them it is. 13B has alibi in place of rope, Baichuan2 a head of normalized
rows.
"""

from __future__ import annotations

import reprlib
from typing import Any

from distllm.errors import CheckpointError
from distllm.models.checks import check_int
from distllm.models.family import Family
from distllm.models.hf_config import refuse, require
from distllm.models.hf_rope import read_rope
from distllm.models.llama import LLAMA, read_llama_like
from distllm.models.sources import QKV, Stored, stacked_qkv
from distllm.models.spec import DecoderSpec

WINDOW = "max_position_embeddings"
VOCAB_SIZE_2 = (
    125696  # of Baichuan2; tuned models may have a few more entries, as Baichuan's have above 64000
)


def read_config(config: dict[str, Any]) -> DecoderSpec:
    refuse(config)
    alibi = _has_alibi(config)
    window = require(config, "model_max_length" if alibi else WINDOW)
    return read_llama_like(
        {**config, WINDOW: window},
        "baichuan",
        rope=None if alibi else read_rope(config),
        alibi_scale=1.0 if alibi else None,
        normalized_head=_has_normalized_head(config),
    )


def _has_alibi(config: dict[str, Any]) -> bool:
    """13B's files name their window model_max_length alone; 7B's have max_position_embeddings."""
    alibi, hidden = config.get(WINDOW) is None, config.get("hidden_size")
    if hidden == (4096 if alibi else 5120):  # the other's
        size, other = ("13B", "7B") if alibi else ("7B", "13B")
        raise CheckpointError(
            f"hidden_size {hidden} is that of {other}, {WINDOW} {reprlib.repr(config.get(WINDOW))} that of "
            f"{size}; 13B, which has alibi, has model_max_length alone"
        )
    return alibi


def _has_normalized_head(config: dict[str, Any]) -> bool:
    vocab_size = require(config, "vocab_size")
    check_int("vocab_size", vocab_size, 1, 2**24)
    return "z_loss_weight" in config or vocab_size >= VOCAB_SIZE_2


SLOTS = {
    **LLAMA.slots,
    **dict.fromkeys(QKV, Stored(("model.layers.{n}.self_attn.W_pack",), stacked_qkv)),
}
BAICHUAN = Family(
    "baichuan",
    ("BaichuanForCausalLM", "BaiChuanForCausalLM"),
    read_config,
    SLOTS,
    models="Baichuan and Baichuan2: 7B, 13B",
)
