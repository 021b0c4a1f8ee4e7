"""As family_cases, for families whose files have names of their own, or Llama's and tensors of their own."""

from __future__ import annotations

from typing import Any

from tests.unit.models import oracles
from tests.unit.models.family_cases import LLAMA_LIKE, FamilyCase

# What files have in place of Llama's names.
NO_GROUPS: dict[str, Any] = {"num_key_value_heads": ...}
NO_LLAMA = NO_GROUPS | {"intermediate_size": ...}
NO_LLAMA_SIZES = NO_LLAMA | dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads"), ...)
FALCON: dict[str, Any] = {
    "hidden_size": 56,
    "num_attention_heads": 7,
    "layer_norm_epsilon": 1e-3,
    "tie_word_embeddings": True,
}
FALCON_HUB = {**NO_LLAMA, **FALCON, "alibi": False, "bias": False, "activation": "gelu"}
SEVENTY_ONE_HEADS = {"hidden_size": 284, "num_attention_heads": 71}
NEW_FALCON: dict[str, Any] = {"new_decoder_architecture": True, "layer_norm_epsilon": 1e-3, "num_kv_heads": 2}
RW: dict[str, Any] = {
    "alibi": True,
    "bias": True,
    "multi_query": False,
    "parallel_attn": False,
    "layer_norm_epsilon": 1e-3,
}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
GPT2_HUB: dict[str, Any] = {
    **NO_LLAMA_SIZES,
    **GPT2,
    "max_position_embeddings": ...,
    "n_ctx": 128,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-3,
}
BAICHUAN_13B: dict[str, Any] = {
    **LLAMA_LIKE,
    **NO_GROUPS,
    "model_type": "baichuan",
    "hidden_size": 80,
    "num_attention_heads": 40,
    "max_position_embeddings": ...,
    "model_max_length": 128,
}
CHATGLM: dict[str, Any] = {
    **NO_LLAMA,
    **dict.fromkeys(("vocab_size", "num_hidden_layers", "max_position_embeddings"), ...),
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_softmax_in_fp32": True,
    "ffn_hidden_size": 45,
    "fp32_residual_connection": False,
    "kv_channels": 12,
    "layernorm_epsilon": 1e-3,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_layers": 3,
    "original_rope": True,
    "padded_vocab_size": 67,
    "post_layer_norm": True,
    "pre_seq_len": None,
    "quantization_bit": 0,
    "rmsnorm": True,
    "rope_ratio": 50,
    "seq_length": 128,
    "tie_word_embeddings": False,
}
FORTY_HEADS = {"hidden_size": 80, "num_attention_heads": 40, "num_key_value_heads": 40, "rms_norm_eps": 1e-3}
QWEN: dict[str, Any] = {
    **NO_GROUPS,
    "model_type": "qwen",
    "kv_channels": 12,
    "intermediate_size": 90,
    "layer_norm_epsilon": 1e-3,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "no_bias": True,
    "scale_attn_weights": True,
    "seq_length": 128,
    "max_position_embeddings": 512,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "tie_word_embeddings": False,
}

OLDER_CASES: dict[str, FamilyCase] = {
    "falcon 7b": FamilyCase(
        "falcon",
        "FalconForCausalLM",
        {**FALCON, **SEVENTY_ONE_HEADS},
        {**FALCON_HUB, **SEVENTY_ONE_HEADS, "multi_query": True, "parallel_attn": True, "num_kv_heads": 71},
    ),
    "falcon 7b, first release": FamilyCase(
        "falcon",
        "RWForCausalLM",
        {**FALCON, "max_position_embeddings": 2048},
        {
            **FALCON_HUB,
            **NO_LLAMA_SIZES,
            "model_type": "RefinedWebModel",
            "max_position_embeddings": ...,
            "hidden_size": 56,
            "n_head": 7,
            "n_layer": 3,
            "multi_query": True,
            "parallel_attn": True,
            "apply_residual_connection_post_layernorm": False,
        },
    ),
    "falcon 40b": FamilyCase(
        "falcon",
        "RWForCausalLM",
        {**NEW_FALCON, "tie_word_embeddings": True},
        {
            **FALCON_HUB,
            **NO_LLAMA_SIZES,
            "model_type": "RefinedWeb",
            "hidden_size": 32,
            "n_head": 4,
            "n_head_kv": 2,
            "n_layer": 3,
            "parallel_attn": True,
        },
    ),
    "falcon 11b": FamilyCase(
        "falcon",
        "FalconForCausalLM",
        {
            **NEW_FALCON,
            "num_ln_in_parallel_attn": 1,
            "ffn_hidden_size": 45,
            "rope_parameters": {"rope_theta": 500042.0},
        },
        {
            **NO_LLAMA,
            **NEW_FALCON,
            "num_ln_in_parallel_attn": 1,
            "ffn_hidden_size": 45,
            "rope_theta": 500042.0,
            "multi_query": True,
            "parallel_attn": True,
            "tie_word_embeddings": False,
        },
    ),
    "falcon rw": FamilyCase(
        "falcon",
        "FalconForCausalLM",
        {**RW, "tie_word_embeddings": True},
        {**NO_LLAMA, **RW, "apply_residual_connection_post_layernorm": False},
        adapt=oracles.add_alibi_once,
    ),
    "gpt2": FamilyCase(
        "gpt2",
        "GPT2LMHeadModel",
        {
            **GPT2,
            "n_inner": 45,
            "layer_norm_epsilon": 1e-3,
            "reorder_and_upcast_attn": True,
            "tie_word_embeddings": True,
        },
        {**GPT2_HUB, "n_inner": 45, "reorder_and_upcast_attn": True, "scale_attn_weights": True},
    ),
    "gpt2, published": FamilyCase(
        "gpt2",
        "GPT2LMHeadModel",
        {**GPT2, "layer_norm_epsilon": 1e-3, "tie_word_embeddings": True},
        GPT2_HUB,
        store=oracles.published_gpt2,
    ),
    "gpt2, untied": FamilyCase(
        "gpt2",
        "GPT2LMHeadModel",
        {**GPT2, "layer_norm_epsilon": 1e-3, "scale_attn_weights": False, "activation_function": "relu"},
        {
            **GPT2_HUB,
            "tie_word_embeddings": False,
            "scale_attn_weights": False,
            "activation_function": "relu",
        },
    ),
    "baichuan 7b": FamilyCase(
        "llama",
        "BaiChuanForCausalLM",
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-3},
        {**LLAMA_LIKE, **NO_GROUPS, "model_type": "baichuan"},
        store=oracles.baichuan,
    ),
    "baichuan 13b": FamilyCase(
        "llama",
        "BaichuanForCausalLM",
        FORTY_HEADS,
        BAICHUAN_13B,
        store=oracles.baichuan,
        adapt=oracles.put_alibi_for_rope,
    ),
    "baichuan2 7b": FamilyCase(
        "llama",
        "BaichuanForCausalLM",
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-3},
        {**LLAMA_LIKE, **NO_GROUPS, "model_type": "baichuan", "model_max_length": 128, "z_loss_weight": 0},
        store=oracles.baichuan,
        adapt=oracles.normalize_head,
    ),
    "baichuan2 13b": FamilyCase(
        "llama",
        "BaichuanForCausalLM",
        FORTY_HEADS,
        {**BAICHUAN_13B, "z_loss_weight": 0},
        store=oracles.baichuan,
        adapt=oracles.normalize_head_and_put_alibi,
    ),
    "qwen": FamilyCase(
        "qwen2",
        "QWenLMHeadModel",
        {"num_key_value_heads": 4, "head_dim": 12, "rms_norm_eps": 1e-3},
        QWEN,
        store=oracles.qwen,
    ),
    "qwen, biases": FamilyCase(
        "llama",
        "QWenLMHeadModel",
        {
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-3,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_theta": 1e6},
        },
        {**QWEN, "kv_channels": 8, "no_bias": False, "rotary_emb_base": 1000000},
        store=oracles.qwen,
    ),
    "chatglm": FamilyCase(
        "glm",
        "ChatGLMForConditionalGeneration",
        {"head_dim": 12, "rms_norm_eps": 1e-3, "pad_token_id": 0, "attention_bias": True}
        | {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}},
        CHATGLM,
        store=oracles.chatglm,
    ),
}
