"""For each family what transformers is told, and the config.json that a model hub's file would be instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tests.checkpoints import Tensors, make_model

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

LONG_FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}


@dataclass(frozen=True)
class FamilyCase:
    """options: of transformers' config class. hub: what the file has beside SIZES; a change to ... takes one
    of these away.

    Where transformers has no class for the family, model_type is that of a class that computes the same, and
    `store` gives a checkpoint's tensors from its tensors. `adapt` makes that model, once they are stored,
    into the reference.
    """

    model_type: str
    architecture: str
    options: dict[str, Any]
    hub: dict[str, Any] = field(default_factory=dict)
    store: Callable[[Tensors], Tensors] | None = None
    adapt: Callable[[Any], None] | None = None

    def make(self, folder: Path, seed: int) -> Any:
        """Fill the folder and return the reference."""
        model = make_model(folder, self.model_type, seed=seed, **(SIZES | self.options))
        if self.store:
            self.write(folder, self.store(model.state_dict()))
        if self.adapt:
            self.adapt(model)
        return model

    def write(self, folder: Path, tensors: Tensors) -> None:
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.hub_config()))

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
    "phi3": FamilyCase(
        "phi3",
        "Phi3ForCausalLM",
        {"rms_norm_eps": 1e-3, "sliding_window": 8, "pad_token_id": 0},
        {
            **LLAMA_LIKE,
            "attention_bias": False,
            "original_max_position_embeddings": 128,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": 8,
        },
    ),
    "phi3, longrope": FamilyCase(  # Phi-4-mini
        "phi3",
        "Phi3ForCausalLM",
        {
            "hidden_size": 64,
            "rms_norm_eps": 1e-3,
            "pad_token_id": 0,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
            | LONG_FACTORS,
        },
        {
            **LLAMA_LIKE,
            "hidden_size": 64,
            "attention_bias": False,
            "full_attn_mod": 1,
            "interpolate_factor": 1,
            "lm_head_bias": False,
            "mlp_bias": False,
            "original_max_position_embeddings": 64,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "longrope", **LONG_FACTORS},
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
        },
    ),
    "glm": FamilyCase(
        "glm",
        "GlmForCausalLM",
        {"head_dim": 12, "rms_norm_eps": 1e-3, "pad_token_id": 0, "attention_bias": True},
        {**LLAMA_LIKE, "head_dim": 12, "attention_bias": True, "rope_theta": 10000.0},
    ),
    "glm, tied": FamilyCase(
        "glm",
        "GlmForCausalLM",
        {"head_dim": 8, "rms_norm_eps": 1e-3, "pad_token_id": 0, "tie_word_embeddings": True}
        | {"attention_bias": False, "rope_parameters": {"rope_theta": 1e5, "partial_rotary_factor": 1.0}},
        {**LLAMA_LIKE, "head_dim": 8, "attention_bias": False, "tie_word_embeddings": True}
        | {"partial_rotary_factor": 1.0, "rope_theta": 1e5},
    ),
    "glm4": FamilyCase(
        "glm4",
        "Glm4ForCausalLM",
        {"head_dim": 12, "rms_norm_eps": 1e-3, "pad_token_id": 0, "attention_bias": True},
        {**LLAMA_LIKE, "head_dim": 12, "attention_bias": True, "partial_rotary_factor": 0.5}
        | {"rope_theta": 10000.0},
    ),
    "glm4, no biases": FamilyCase(  # GLM-4-32B-0414
        "glm4",
        "Glm4ForCausalLM",
        {"head_dim": 12, "rms_norm_eps": 1e-3, "pad_token_id": 0, "attention_bias": False},
        {**LLAMA_LIKE, "head_dim": 12, "attention_bias": False, "partial_rotary_factor": 0.5},
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
