"""config.json as data: what families share in reading it. Knows both dialects, never a family, a file or a
tensor.

transformers 4 writes rope_theta, rope_scaling {type | rope_type, …} and torch_dtype; transformers 5 writes
rope_parameters {rope_theta, rope_type, …} and dtype. Numbers are bounded by DecoderSpec.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, cast

from distllm.errors import CheckpointError
from distllm.models.checks import check_choice, check_int
from distllm.models.spec import DTYPES, Activation, DType

Config = dict[str, Any]

OFF: tuple[object, ...] = (None, False)
ONE: tuple[object, ...] = (None, 1, 1.0)
NONE: tuple[object, ...] = (None,)
# Keys that change the result in some family, with the values under which they do not.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "add_cross_attention": OFF,
    "alibi": OFF,
    "apply_residual_connection_post_layernorm": OFF,
    "attention_bias": OFF,
    "attention_multiplier": NONE,
    "attn_logit_softcapping": NONE,
    "clip_qkv": NONE,
    "embedding_multiplier": ONE,
    "final_logit_softcapping": NONE,
    "lm_head_bias": OFF,
    "logit_scale": ONE,
    "logits_scaling": ONE,
    "mlp_bias": OFF,
    "n_routed_experts": NONE,
    "n_shared_experts": (None, 0),
    "no_rope_layers": NONE,
    "norm_type": NONE,
    "num_experts": NONE,
    "num_local_experts": NONE,
    "parallel_attn": OFF,
    "position_embedding_type": NONE,
    "qk_layernorm": OFF,
    "quantization_bit": OFF,
    "quantization_config": NONE,
    "query_pre_attn_scalar": NONE,
    "residual_multiplier": ONE,
    "rope_local_base_freq": NONE,
    "scale_attn_by_inverse_layer_idx": OFF,
    "scale_attn_weights": (None, True),
    "scale_depth": NONE,
    "scale_emb": ONE,
    "shared_expert_intermediate_size": (None, 0),
    "sliding_window": NONE,
    "sliding_window_pattern": NONE,
    "use_bidirectional_attention": OFF,
    "use_dynamic_ntk": OFF,
    "use_logn_attn": OFF,
    "use_parallel_residual": OFF,
    "use_qk_norm": OFF,
    "use_sliding_window": OFF,
    "vision_config": NONE,
}
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
FULL, SLIDING = "full_attention", "sliding_attention"


def require(config: Config, key: str) -> Any:
    """The value of a key for which a guess would be a different model."""
    if config.get(key) is None:
        raise CheckpointError(f"{key} is missing")
    return config[key]


def renamed(config: Config, names: dict[str, str]) -> Config:
    """The config with Llama's names beside a family's own. names: theirs → Llama's; where a file has both,
    theirs counts.
    """
    return config | {llama: config[own] for own, llama in names.items() if own in config}


def read_flag(config: Config, key: str, default: bool | None = None) -> bool:
    """default None: the key must be there."""
    value = require(config, key) if default is None else config.get(key, default)
    check_choice(key, value, (False, True))
    return cast(bool, value)


def read_width(config: Config, key: str) -> int:
    """An MLP's width, which is four times hidden_size where the file does not say it."""
    hidden, written = require(config, "hidden_size"), config.get(key)
    check_int("hidden_size", hidden, 1, 2**18)
    return cast(int, 4 * hidden if written is None else written)


def refuse(
    config: Config, reads: tuple[str, ...] = (), neutral: Mapping[str, tuple[object, ...]] = NEUTRAL
) -> None:
    """Raise if a key that the family does not read has a value with an effect. neutral: of each key the
    values without one; a family may have keys of its own.
    """
    for key, harmless in neutral.items():
        if key in config and key not in reads and config[key] not in harmless:
            raise CheckpointError(
                f"{key} {reprlib.repr(config[key])} is not supported; only {', '.join(map(repr, harmless))}"
            )


def read_dtype(config: Config) -> DType:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    check_choice("dtype", value, DTYPES)
    return cast(DType, value)


def read_activation(config: Config, key: str = "hidden_act") -> Activation:
    value = require(config, key)
    check_choice(key, value, tuple(ACTIVATIONS))
    return ACTIVATIONS[value]


def read_head_dim(config: Config) -> int:
    """head_dim, by itself or as hidden_size / num_attention_heads."""
    if config.get("head_dim") is not None:
        check_int("head_dim", config["head_dim"], 1, 2**12)
        return cast(int, config["head_dim"])
    hidden, heads = require(config, "hidden_size"), require(config, "num_attention_heads")
    check_int("num_attention_heads", heads, 1, 2**12)
    check_int("hidden_size", hidden, 1, 2**18)
    if hidden % heads:
        raise CheckpointError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    return cast(int, hidden // heads)


def read_windows(config: Config, window: Any, slides: Callable[[int], bool]) -> tuple[int, ...]:
    """The window of each layer: of those that layer_types names, in files without it of those that `slides`
    names by number. window: None for none at all.
    """
    num_layers = require(config, "num_hidden_layers")
    check_int("num_layers", num_layers, 1, 2**12)
    known = (FULL,) if window is None else (FULL, SLIDING)
    by_rule = [SLIDING if window is not None and slides(n) else FULL for n in range(num_layers)]
    kinds = config.get("layer_types") or by_rule
    if not isinstance(kinds, list):
        raise CheckpointError(f"layer_types is {reprlib.repr(kinds)}; it must be a list")
    for kind in kinds:
        check_choice("a layer type", kind, known)
    if SLIDING not in kinds:
        return ()
    check_int("sliding_window", window, 1, 2**27)
    return tuple(window if kind == SLIDING else 0 for kind in kinds)
