"""RopeSpec: a rotary embedding as data, with every way to stretch it. Needs no torch: `rope.py` computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from distllm.errors import CheckpointError
from distllm.models.checks import check_choice, check_int, check_number

MAX_POSITION = 2**27


@dataclass(frozen=True)
class LinearScaling:
    """Every frequency is divided by the factor."""

    factor: float
    kind: Literal["linear"] = "linear"

    def __post_init__(self) -> None:
        _check_factor(self.factor)


@dataclass(frozen=True)
class Llama3Scaling:
    """Slow pairs are divided by the factor, fast ones stay, those between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int
    kind: Literal["llama3"] = "llama3"

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_original(self.original_max_position)
        check_number("rope low_freq_factor", self.low_freq_factor, 1e-6, 1e6)
        check_number("rope high_freq_factor", self.high_freq_factor, 1e-6, 1e6)
        if self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError(
                f"rope high_freq_factor is {self.high_freq_factor}; it must be above low_freq_factor "
                f"{self.low_freq_factor}"
            )


@dataclass(frozen=True)
class YarnScaling:
    """As llama3 with a ramp over pair numbers; cosines and sines are multiplied by attention_factor."""

    factor: float
    original_max_position: int
    attention_factor: float
    beta_fast: float = 32.0  # turns within the original window from which a pair is fast
    beta_slow: float = 1.0  # and up to which it is slow
    truncate: bool = True  # the ramp's ends to whole pairs
    kind: Literal["yarn"] = "yarn"

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_original(self.original_max_position)
        check_number("rope attention_factor", self.attention_factor, 1e-3, 1e3)
        check_number("rope beta_slow", self.beta_slow, 1e-6, 1e6)
        check_number("rope beta_fast", self.beta_fast, self.beta_slow, 1e6)
        check_choice("rope truncate", self.truncate, (False, True))


@dataclass(frozen=True)
class DynamicScaling:
    """NTK: theta grows with the context beyond the original window.

    One theta for all requests, of the engine's max_model_len: cached keys of a growing context would need to
    be rotated again with each new theta.
    """

    factor: float
    original_max_position: int
    kind: Literal["dynamic"] = "dynamic"

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        _check_original(self.original_max_position)


@dataclass(frozen=True)
class LongScaling:
    """longrope: each pair's frequency is divided by a factor of its own; cosines and sines are multiplied by
    attention_factor.

    The long factors if the engine's max_model_len exceeds the original window, the short ones otherwise, for
    every request alike.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_position: int
    attention_factor: float
    kind: Literal["longrope"] = "longrope"

    def __post_init__(self) -> None:
        _check_original(self.original_max_position)
        check_number("rope attention_factor", self.attention_factor, 1e-3, 1e3)
        for factor in (*self.short, *self.long):
            check_number("rope short_factor and long_factor", factor, 1e-3, 1e6)


Scaling = LinearScaling | Llama3Scaling | YarnScaling | DynamicScaling | LongScaling
_SCALINGS: dict[str, type[Any]] = {
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
    "dynamic": DynamicScaling,
    "longrope": LongScaling,
}
SCALING_KINDS = tuple(_SCALINGS)


@dataclass(frozen=True)
class RopeSpec:
    """Pairs are x[i] and x[i + rotary_dim / 2]; interleaved, x[2i] and x[2i + 1]."""

    theta: float
    scaling: Scaling | None = None
    rotary_dim: int | None = None  # None: the whole head; what lies behind it stays
    interleaved: bool = False

    def __post_init__(self) -> None:
        check_number("rope_theta", self.theta, 2.0, 1e12)
        check_choice("interleaved", self.interleaved, (False, True))

    def check_head(self, head_dim: int) -> None:
        """Raise CheckpointError unless heads of this size can be rotated so."""
        dim = head_dim if self.rotary_dim is None else self.rotary_dim
        check_int("rotary_dim", dim, 2, head_dim)
        if dim % 2:
            name = "head_dim" if self.rotary_dim is None else "rotary_dim"
            raise CheckpointError(f"{name} is {dim}; rope turns pairs, so it must be even")
        if isinstance(self.scaling, DynamicScaling) and dim == 2:
            raise CheckpointError("rotary_dim is 2; dynamic rope needs at least 4")
        if isinstance(self.scaling, LongScaling):
            for factors in (self.scaling.short, self.scaling.long):
                if len(factors) != dim // 2:
                    raise CheckpointError(f"{len(factors)} longrope factors for {dim // 2} pairs of a head")

    @staticmethod
    def from_dict(data: dict[str, Any]) -> RopeSpec:
        scaling = data["scaling"]
        if scaling is not None:
            values = {key: tuple(v) if isinstance(v, list) else v for key, v in scaling.items()}
            scaling = _SCALINGS[scaling["kind"]](**values)
        return RopeSpec(**{**data, "scaling": scaling})


def _check_factor(factor: float) -> None:
    check_number("rope factor", factor, 1.0, 1e6)


def _check_original(position: int) -> None:
    check_int("rope original_max_position_embeddings", position, 1, MAX_POSITION)
