"""What the config.json of published models comes to, where keys alone do not say it."""

from __future__ import annotations

from typing import Any

import pytest

from distllm.models.registry import parse_config
from distllm.models.rope_spec import RopeSpec

FALCON: dict[str, Any] = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "vocab_size": 65024,
    "layer_norm_epsilon": 1e-5,
    "alibi": False,
    "bias": False,
    "parallel_attn": True,
}
FALCON_7B = FALCON | {
    "architectures": ["RWForCausalLM"],
    "model_type": "RefinedWebModel",
    "hidden_size": 4544,
    "n_head": 71,
    "n_layer": 32,
    "multi_query": True,
}
FALCON_40B = FALCON | {
    "architectures": ["RWForCausalLM"],
    "model_type": "RefinedWeb",
    "hidden_size": 8192,
    "n_head": 128,
    "n_head_kv": 8,
    "n_layer": 60,
}
FALCON_180B = FALCON | {
    "hidden_size": 14848,
    "num_attention_heads": 232,
    "num_hidden_layers": 80,
    "num_kv_heads": 8,
    "multi_query": True,
    "new_decoder_architecture": True,
}
FALCON_11B = FALCON | {
    "hidden_size": 4096,
    "ffn_hidden_size": 16384,
    "num_attention_heads": 32,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
    "num_ln_in_parallel_attn": 1,
    "max_position_embeddings": 8192,
    "rope_theta": 500042.0,
    "new_decoder_architecture": True,
    "tie_word_embeddings": False,
}
FALCON_RW = FALCON | {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "alibi": True,
    "bias": True,
    "multi_query": False,
    "parallel_attn": False,
}
BAICHUAN: dict[str, Any] = {
    "architectures": ["BaichuanForCausalLM"],
    "model_type": "baichuan",
    "vocab_size": 64000,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SEVEN = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 4096,
}
THIRTEEN = {
    "hidden_size": 5120,
    "intermediate_size": 13696,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "model_max_length": 4096,
}
QWEN_7B: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 32768,
    "no_bias": True,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
}
FIRST_QWEN = {
    "n_embd": 4096, "ffn_hidden_size": 22016, "n_head": 32, "n_layer": 32, "n_positions": 6144,
    "padded_vocab_size": 151936,
}  # fmt: skip
ROPE, LONG_ROPE = RopeSpec(10000.0), RopeSpec(500042.0)
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "falcon-7b": (
        FALCON_7B,
        {"num_heads": 71, "num_kv_heads": 1, "residual": "parallel_shared", "intermediate_size": 18176},
    ),
    "falcon-7b, later": (
        FALCON_7B | {"model_type": "falcon", "num_kv_heads": 71, "new_decoder_architecture": False},
        {"num_kv_heads": 1, "head_dim": 64, "tied_embeddings": True, "max_position_embeddings": 2048},
    ),
    "falcon-40b": (FALCON_40B, {"num_kv_heads": 8, "residual": "parallel", "intermediate_size": 32768}),
    "falcon-180b": (FALCON_180B, {"num_kv_heads": 8, "residual": "parallel", "rope": ROPE}),
    "falcon-11b": (
        FALCON_11B,
        {"residual": "parallel_shared", "rope": LONG_ROPE, "tied_embeddings": False, "num_kv_heads": 8},
    ),
    "falcon-rw-1b": (
        FALCON_RW,
        {"residual": "sequential", "rope": None, "alibi_scale": 0.125, "num_kv_heads": 32, "out_bias": True},
    ),
    "baichuan-7b": (
        BAICHUAN | SEVEN | {"architectures": ["BaiChuanForCausalLM"]},
        {"rope": ROPE, "alibi_scale": None, "normalized_head": False, "num_kv_heads": 32},
    ),
    "baichuan-13b": (
        BAICHUAN | THIRTEEN,
        {"rope": None, "alibi_scale": 1.0, "normalized_head": False, "max_position_embeddings": 4096},
    ),
    "baichuan-13b, tokens added": (BAICHUAN | THIRTEEN | {"vocab_size": 64016}, {"normalized_head": False}),
    "baichuan2-7b": (
        BAICHUAN | SEVEN | {"vocab_size": 125696, "model_max_length": 4096, "z_loss_weight": 0},
        {"rope": ROPE, "alibi_scale": None, "normalized_head": True},
    ),
    "baichuan2-13b": (
        BAICHUAN | THIRTEEN | {"vocab_size": 125696},
        {"rope": None, "alibi_scale": 1.0, "normalized_head": True, "max_position_embeddings": 4096},
    ),
    "baichuan2-13b, tokens added": (
        BAICHUAN | THIRTEEN | {"vocab_size": 125712},
        {"normalized_head": True},
    ),
    "qwen-7b": (
        QWEN_7B,
        {"intermediate_size": 11008, "max_position_embeddings": 8192, "out_bias": False, "dtype": "bfloat16"},
    ),
    "qwen-7b, first": (
        {
            key: value
            for key, value in QWEN_7B.items()
            if not key.startswith(("num_", "hidden", "max_", "inter"))
        }
        | FIRST_QWEN
        | {"seq_length": 2048},
        {"intermediate_size": 11008, "max_position_embeddings": 2048, "num_layers": 32, "num_kv_heads": 32},
    ),
    "qwen-7b, both names": (QWEN_7B | {"padded_vocab_size": 152064}, {"vocab_size": 152064}),
    "qwen, part of a head turns": (
        QWEN_7B | {"rotary_pct": 0.25},
        {"rope": RopeSpec(10000.0, rotary_dim=32)},
    ),
    "qwen, tricks off": (
        QWEN_7B | {"use_dynamic_ntk": False, "use_logn_attn": False, "no_bias": False},
        {"max_position_embeddings": 32768, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str) -> None:
    config, expected = PUBLISHED[name]
    spec = parse_config(config)
    assert {field: getattr(spec, field) for field in expected} == expected
