"""The config.json of released models comes to as many parameters as were published: widths, heads and biases
are read as their authors meant them.
"""

from __future__ import annotations

from typing import Any

import pytest

from distllm.engine.describe import describe
from distllm.models.registry import parse_config

CHATGLM: dict[str, Any] = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "ffn_hidden_size": 13696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
PHI: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
PHI_4_MINI = PHI | {
    "max_position_embeddings": 131072,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
GLM_4_32B: dict[str, Any] = {
    "architectures": ["Glm4ForCausalLM"],
    "model_type": "glm4",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "intermediate_size": 23040,
    "max_position_embeddings": 32768,
    "num_attention_heads": 48,
    "num_hidden_layers": 61,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 151552,
}


@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [
        (CHATGLM | {"num_layers": 28, "padded_vocab_size": 65024, "seq_length": 8192}, 6_243_584_000),
        (
            CHATGLM
            | {"num_layers": 40, "padded_vocab_size": 151552, "seq_length": 131072, "rope_ratio": 500},
            9_399_951_360,
        ),
        (PHI, 3_821_079_552),
        (PHI_4_MINI, 3_836_021_760),
        (GLM_4_32B, 32_566_081_536),
    ],
    ids=["chatglm3-6b", "glm-4-9b-chat", "Phi-3-mini-4k", "Phi-4-mini", "GLM-4-32B-0414"],
)
def test_parameters(config: dict[str, Any], num_parameters: int) -> None:
    assert describe(parse_config(config), 1, 1, None).num_parameters == num_parameters
