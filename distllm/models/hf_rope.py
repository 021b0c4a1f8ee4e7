"""The rope settings of a config.json, in both dialects, as a RopeSpec; and the window that they open."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from typing import Any

from distllm.errors import CheckpointError
from distllm.models.checks import check_choice, check_int, check_number
from distllm.models.hf_config import FULL, SLIDING, Config, read_head_dim, require
from distllm.models.rope_spec import (
    MAX_POSITION,
    SCALING_KINDS,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    RopeSpec,
    Scaling,
    YarnScaling,
)

KNOWN_KEYS = (
    "rope_theta", "rope_type", "type", "factor", "partial_rotary_factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "truncate", "short_factor", "long_factor", "finetuned",
)  # fmt: skip
ORIGINAL = "original_max_position_embeddings"


def read_rope(config: Config, theta: float = 10000.0) -> RopeSpec:
    """theta: of files that have none."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(f"rope settings {reprlib.repr(rope)} are not supported; one for all layers is")
    for key in rope:
        if key not in KNOWN_KEYS:
            raise CheckpointError(f"rope setting {reprlib.repr(key)} is not supported")
    written: Any = rope.get("rope_theta", config.get("rope_theta", theta))
    return RopeSpec(
        theta=written,
        scaling=_read_scaling(config, rope),
        rotary_dim=_rotary_dim(config, rope),
    )


def read_ropes_by_layer(config: Config, theta: float) -> tuple[RopeSpec, RopeSpec]:
    """Of layers that see everything, whose default theta is given, and of those with a window."""
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and rope and rope.keys() <= {FULL, SLIDING}:
        base = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}
        full, sliding = ({**base, "rope_parameters": rope.get(kind)} for kind in (FULL, SLIDING))
    else:
        local = config.get("rope_local_base_freq", 10000.0)
        full, sliding = config, {**config, "rope_scaling": {"rope_theta": local}}
    return read_rope(full, theta), read_rope(sliding)


def read_max_positions(config: Config, rope: RopeSpec | None) -> int:
    """The longest sequence. yarn and dynamic stretch the window that max_position_embeddings names, which
    files leave as it was; for the others it is the stretched one already.
    """
    written: int = require(config, "max_position_embeddings")
    scaling = rope.scaling if rope else None
    if not isinstance(scaling, YarnScaling | DynamicScaling):
        return written
    return max(written, int(scaling.original_max_position * scaling.factor))


def _rotary_dim(config: Config, rope: Config) -> int | None:
    factor = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if factor is None or factor == 1:
        return None
    check_number("partial_rotary_factor", factor, 0.0, 1.0)
    return int(read_head_dim(config) * factor)


def _read_scaling(config: Config, rope: Config) -> Scaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("short_factor") is not None:  # older Phi-3 files call it su or yarn
        kind = "longrope"
    check_choice("rope type", kind, ("default", *SCALING_KINDS))
    return None if kind == "default" else _READERS[kind](config, rope)


def _linear(config: Config, rope: Config) -> LinearScaling:
    return LinearScaling(require(rope, "factor"))


def _llama3(config: Config, rope: Config) -> Llama3Scaling:
    low, high = require(rope, "low_freq_factor"), require(rope, "high_freq_factor")
    return Llama3Scaling(require(rope, "factor"), low, high, require(rope, ORIGINAL))


def _dynamic(config: Config, rope: Config) -> DynamicScaling:
    return DynamicScaling(require(rope, "factor"), require(config, "max_position_embeddings"))


def _yarn(config: Config, rope: Config) -> YarnScaling:
    return YarnScaling(
        factor=require(rope, "factor"),
        original_max_position=_original(config, rope),
        attention_factor=_yarn_attention_factor(rope),
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        truncate=rope.get("truncate", True),
    )


def _yarn_attention_factor(rope: Config) -> float:
    """As given, or 0.1 · ln factor + 1; with mscale and mscale_all_dim, the ratio of two such."""
    if rope.get("attention_factor") is not None:
        given: float = rope["attention_factor"]
        return given
    factor, over, under = require(rope, "factor"), rope.get("mscale"), rope.get("mscale_all_dim")
    check_number("rope factor", factor, 1.0, 1e6)
    if not over or not under:
        over, under = 1.0, 0.0
    check_number("rope mscale", over, 0.0, 1e3)
    check_number("rope mscale_all_dim", under, 0.0, 1e3)
    return float((0.1 * over * math.log(factor) + 1) / (0.1 * under * math.log(factor) + 1))


def _longrope(config: Config, rope: Config) -> LongScaling:
    factors = [require(rope, key) for key in ("short_factor", "long_factor")]
    if not all(isinstance(each, list) for each in factors):
        raise CheckpointError(f"longrope factors {reprlib.repr(factors)} must be lists")
    original, given = _original(config, rope), rope.get("attention_factor")
    attention = _longrope_attention_factor(config, rope, original) if given is None else given
    return LongScaling(tuple(factors[0]), tuple(factors[1]), original, attention)


def _longrope_attention_factor(config: Config, rope: Config, original: int) -> float:
    """√(1 + ln factor / ln original window), by how much the window has grown."""
    factor = rope.get("factor") or require(config, "max_position_embeddings") / original
    check_number("rope factor", factor, 0.0, 1e6)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _original(config: Config, rope: Config) -> int:
    value: Any = rope.get(ORIGINAL) or config.get(ORIGINAL) or require(config, "max_position_embeddings")
    check_int(f"rope {ORIGINAL}", value, 2, MAX_POSITION)
    check_int("max_position_embeddings", require(config, "max_position_embeddings"), 1, MAX_POSITION)
    return int(value)


_READERS: dict[str, Callable[[Config, Config], Scaling]] = {
    "linear": _linear,
    "llama3": _llama3,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
}
