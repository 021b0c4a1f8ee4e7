"""ChatGLM2, ChatGLM3 and GLM-4-9B in the layout of their own code: GLM under other names."""

from __future__ import annotations

from typing import Any

from distllm.errors import CheckpointError
from distllm.models.checks import check_int, check_number
from distllm.models.family import Family
from distllm.models.hf_config import OFF, refuse, renamed, require
from distllm.models.llama import read_llama_like
from distllm.models.rope_spec import MAX_POSITION, RopeSpec
from distllm.models.sources import GATE_UP, QKV, Stored, gate_up, stacked_qkv
from distllm.models.spec import DecoderSpec

NAMES = {
    "num_layers": "num_hidden_layers",
    "padded_vocab_size": "vocab_size",
    "ffn_hidden_size": "intermediate_size",
    "multi_query_group_num": "num_key_value_heads",
    "kv_channels": "head_dim",
    "layernorm_epsilon": "rms_norm_eps",
    "seq_length": "max_position_embeddings",
}
MUST_BE_ON = ("multi_query_attention", "original_rope", "post_layer_norm", "rmsnorm")
MUST_BE_OFF = ("position_encoding_2d", "pre_seq_len", "rope_scaling", "tie_word_embeddings")
NEUTRAL = {**dict.fromkeys(MUST_BE_OFF, OFF), **dict.fromkeys(MUST_BE_ON, (True,))}


def read_config(config: dict[str, Any]) -> DecoderSpec:
    refuse(config)
    refuse({"multi_query_attention": False, **config}, neutral=NEUTRAL)
    for name in NAMES:
        require(config, name)
    bias = config.get("add_bias_linear", False)
    return read_llama_like(
        renamed(config, NAMES),
        "chatglm",
        rope=_read_rope(config),
        activation="silu",
        qkv_bias=bias or config.get("add_qkv_bias", False),
        out_bias=bias,
        mlp_bias=bias,
    )


def _read_rope(config: dict[str, Any]) -> RopeSpec:
    """rope_ratio multiplies theta; but ChatGLM2-6B-32K divides positions by it, as far as its window grew."""
    ratio, head_dim, window = config.get("rope_ratio", 1), config["kv_channels"], config["seq_length"]
    check_number("rope_ratio", ratio, 1.0, 1e6)
    check_int("kv_channels", head_dim, 4, 2**12)
    check_int("seq_length", window, 1, MAX_POSITION)
    if 1 < ratio <= window / 2048:
        raise CheckpointError(
            f"rope_ratio {ratio} for {window} positions is ChatGLM2-6B-32K's; not supported"
        )
    return RopeSpec(1e4 * ratio, rotary_dim=head_dim // 2, interleaved=True)


_LAYER = "transformer.encoder.layers.{n}"
CHATGLM = Family(
    "chatglm",
    ("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    read_config,
    slots={
        "embed": "transformer.embedding.word_embeddings",
        "layers.{n}.attn_norm": f"{_LAYER}.input_layernorm",
        **dict.fromkeys(QKV, Stored((f"{_LAYER}.self_attention.query_key_value",), stacked_qkv)),
        "layers.{n}.attn.o": f"{_LAYER}.self_attention.dense",
        "layers.{n}.mlp_norm": f"{_LAYER}.post_attention_layernorm",
        **dict.fromkeys(GATE_UP, Stored((f"{_LAYER}.mlp.dense_h_to_4h",), gate_up)),
        "layers.{n}.mlp.down": f"{_LAYER}.mlp.dense_4h_to_h",
        "final_norm": "transformer.encoder.final_layernorm",
        "head": "transformer.output_layer",
    },
    models="ChatGLM2-6B, ChatGLM3-6B (8k, 32k, 128k), GLM-4-9B (128k, 1M)",
    notes="not the first ChatGLM-6B, ChatGLM2-6B-32K or GLM-4V",
)
