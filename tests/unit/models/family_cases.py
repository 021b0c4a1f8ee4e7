"""For each family what transformers is told, and the config.json that a model hub's file would be instead."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 45,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_LIKE = {"hidden_act": "silu", "rms_norm_eps": 1e-3, "tie_word_embeddings": False}


@dataclass(frozen=True)
class FamilyCase:
    """options: of transformers' config class. hub: what the file has beside SIZES; a change to ... takes one
    of these away.
    """

    model_type: str
    architecture: str
    options: dict[str, Any]
    hub: dict[str, Any] = field(default_factory=dict)

    def hub_config(self) -> dict[str, Any]:
        names = {"architectures": [self.architecture], "model_type": self.model_type}
        config = SIZES | names | {"torch_dtype": "float32"} | self.hub
        return {key: value for key, value in config.items() if value is not ...}


CASES: dict[str, FamilyCase] = {
    "mistral, window": FamilyCase(
        "mistral",
        "MistralForCausalLM",
        {"sliding_window": 8, "rms_norm_eps": 1e-3},
        {**LLAMA_LIKE, "sliding_window": 8, "rope_theta": 10000.0},
    ),
    "mistral, none": FamilyCase(
        "mistral",
        "MistralForCausalLM",
        {
            "sliding_window": None,
            "head_dim": 12,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {"rope_theta": 1e6},
        },
        {**LLAMA_LIKE, "sliding_window": None, "head_dim": 12, "rope_theta": 1e6},
    ),
    "qwen2, window off": FamilyCase(
        "qwen2",
        "Qwen2ForCausalLM",
        {"rms_norm_eps": 1e-3, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}},
        {
            **LLAMA_LIKE,
            "use_sliding_window": False,
            "sliding_window": 8,
            "max_window_layers": 1,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2, window on": FamilyCase(
        "qwen2",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "rms_norm_eps": 1e-3},
        {
            **LLAMA_LIKE,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
            "rope_theta": 1e4,
        },
    ),
    "qwen3": FamilyCase(
        "qwen3",
        "Qwen3ForCausalLM",
        {"head_dim": 12, "rms_norm_eps": 1e-3, "rope_parameters": {"rope_theta": 1e6}},
        {
            **LLAMA_LIKE,
            "head_dim": 12,
            "attention_bias": False,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": 36,
        },
    ),
    "qwen3, biases": FamilyCase(
        "qwen3",
        "Qwen3ForCausalLM",
        {"head_dim": 12, "rms_norm_eps": 1e-3, "attention_bias": True},
        {**LLAMA_LIKE, "head_dim": 12, "attention_bias": True},
    ),
    "starcoder2": FamilyCase(
        "starcoder2",
        "Starcoder2ForCausalLM",
        {
            "sliding_window": 8,
            "norm_epsilon": 1e-3,
            "rope_parameters": {"rope_theta": 999999.4420358813},
            "tie_word_embeddings": True,
        },
        {
            "hidden_act": "gelu_pytorch_tanh",
            "mlp_type": "default",
            "norm_epsilon": 1e-3,
            "norm_type": "layer_norm",
            "rope_theta": 999999.4420358813,
            "sliding_window": 8,
            "use_bias": True,
        },
    ),
    "starcoder2, untied": FamilyCase(
        "starcoder2",
        "Starcoder2ForCausalLM",
        {"hidden_act": "relu", "use_bias": False, "tie_word_embeddings": False},
        {"hidden_act": "relu", "norm_epsilon": 1e-5, "use_bias": False, "tie_word_embeddings": False},
    ),
    "gemma2": FamilyCase(
        "gemma2",
        "Gemma2ForCausalLM",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-3,
        },
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "hidden_act": "gelu",  # counts for nothing
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "cache_implementation": "hybrid",
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-3,
        },
    ),
    "gemma3": FamilyCase(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 7,
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 8,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {
            "num_hidden_layers": 7,
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 8,
            "sliding_window_pattern": 6,
            "hidden_activation": "gelu_pytorch_tanh",
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": False,
            "rope_theta": 1000000,
            "rope_local_base_freq": 10000,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rms_norm_eps": 1e-3,
        },
    ),
    "mixtral": FamilyCase(
        "mixtral",
        "MixtralForCausalLM",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {"rope_theta": 1e6},
        },
        {
            **LLAMA_LIKE,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "rope_theta": 1e6,
        },
    ),
    "mixtral, window": FamilyCase(
        "mixtral",
        "MixtralForCausalLM",
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 3,
            "head_dim": 12,
            "sliding_window": 8,
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": True,
        },
        {
            **LLAMA_LIKE,
            "num_local_experts": 3,
            "num_experts_per_tok": 3,
            "head_dim": 12,
            "sliding_window": 8,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe": FamilyCase(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 9,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 13,
            "norm_topk_prob": True,
            "head_dim": 12,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {"rope_theta": 1e6},
        },
        {
            **LLAMA_LIKE,
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 12,
            "max_window_layers": 3,
            "mlp_only_layers": [],
            "moe_intermediate_size": 13,
            "norm_topk_prob": True,
            "num_experts": 9,
            "num_experts_per_tok": 3,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
        },
    ),
    "qwen3_moe, dense layers": FamilyCase(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {
            "num_hidden_layers": 5,  # experts on the second alone
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 11,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "attention_bias": True,
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": True,
        },
        {
            **LLAMA_LIKE,
            "num_hidden_layers": 5,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 11,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
}
