"""config.json as data: what families share in reading it. Knows both dialects, never a family, a file or a
tensor.

transformers 4 writes rope_theta, rope_scaling {type | rope_type, …} and torch_dtype; transformers 5 writes
rope_parameters {rope_theta, rope_type, …} and dtype. Numbers are bounded by DecoderSpec.
"""

from __future__ import annotations

import reprlib
from typing import Any, cast

from distllm.errors import CheckpointError
from distllm.models.spec import DTYPES, DType, RopeScaling, RopeSpec, check_choice, check_int

Config = dict[str, Any]


def require(config: Config, key: str) -> Any:
    """The value of a key for which a guess would be a different model."""
    if config.get(key) is None:
        raise CheckpointError(f"{key} is missing")
    return config[key]


def refuse(config: Config, neutral: dict[str, tuple[object, ...]]) -> None:
    """Raise if a key that is not implemented has a value with an effect."""
    for key, harmless in neutral.items():
        if key in config and config[key] not in harmless:
            raise CheckpointError(
                f"{key} {reprlib.repr(config[key])} is not supported; only {', '.join(map(repr, harmless))}"
            )


def read_dtype(config: Config) -> DType:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    check_choice("dtype", value, DTYPES)
    return cast(DType, value)


def read_head_dim(config: Config) -> int:
    """head_dim, by itself or as hidden_size / num_attention_heads."""
    if config.get("head_dim") is not None:
        return cast(int, config["head_dim"])
    hidden, heads = require(config, "hidden_size"), require(config, "num_attention_heads")
    check_int("num_attention_heads", heads, 1, 2**12)
    check_int("hidden_size", hidden, 1, 2**18)
    if hidden % heads:
        raise CheckpointError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    return cast(int, hidden // heads)


def read_rope(config: Config) -> RopeSpec:
    """Either dialect; theta defaults to the 10000 of the files that predate the key."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(f"rope settings {reprlib.repr(rope)} are not supported; one for all layers is")
    theta: Any = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    refuse(rope, {"partial_rotary_factor": (None, 1, 1.0)})
    return RopeSpec(theta, _read_scaling(rope))


def _read_scaling(rope: Config) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    check_choice("rope type", kind, ("default", "linear", "llama3"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", require(rope, "factor"))
    return RopeScaling(
        "llama3",
        factor=require(rope, "factor"),
        low_freq_factor=require(rope, "low_freq_factor"),
        high_freq_factor=require(rope, "high_freq_factor"),
        original_max_position=require(rope, "original_max_position_embeddings"),
    )
