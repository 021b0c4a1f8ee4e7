"""DecoderSpec: everything that a decoder-only family can vary, as data. Built by a family from config.json.

Checks its own bounds, since its numbers come from files. Knows no tensor and no rank. The torch decoder,
the shard table, `distllm plan` and the engine format read it.
"""

from __future__ import annotations

import reprlib
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from distllm.errors import CheckpointError

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = get_args(DType)
DTYPE_BYTES: dict[DType, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

# Generous for any model known, small enough that a damaged file cannot ask for absurd amounts of memory.
_INT_LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "num_layers": 2**12,
    "num_heads": 2**12,
    "num_kv_heads": 2**12,
    "head_dim": 2**12,
    "intermediate_size": 2**20,
    "max_position_embeddings": 2**27,
}


def check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise CheckpointError(f"{name} is {reprlib.repr(value)}; it must be an integer from {low} to {high}")


def check_number(name: str, value: object, low: float, high: float) -> None:
    """NaN and infinities fail the comparison."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise CheckpointError(
            f"{name} is {reprlib.repr(value)}; it must be a number from {low:g} to {high:g}"
        )


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """True is not 1 here."""
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise CheckpointError(f"{name} is {reprlib.repr(value)}; supported: {', '.join(map(repr, choices))}")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies change beyond the original window."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0  # llama3 only, as are the two below
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        check_choice("rope type", self.kind, ("linear", "llama3"))
        check_number("rope factor", self.factor, 1.0, 1e6)
        check_number("rope low_freq_factor", self.low_freq_factor, 1e-6, 1e6)
        check_number("rope high_freq_factor", self.high_freq_factor, 1e-6, 1e6)
        check_int("rope original_max_position_embeddings", self.original_max_position, 1, 2**27)
        if self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError(
                f"rope high_freq_factor is {self.high_freq_factor}; it must be above low_freq_factor "
                f"{self.low_freq_factor}"
            )


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding over the whole head, halves paired (x[i], x[i + head_dim / 2])."""

    theta: float
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        check_number("rope_theta", self.theta, 1.0, 1e12)


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only transformer: RMSNorm before attention and MLP, GQA with rope, gated MLP."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    activation: Literal["silu"]
    norm_eps: float
    rope: RopeSpec
    qkv_bias: bool
    out_bias: bool  # of the attention's output projection
    mlp_bias: bool
    tied_embeddings: bool
    max_position_embeddings: int
    dtype: DType  # of the checkpoint

    def __post_init__(self) -> None:
        for name, high in _INT_LIMITS.items():
            check_int(name, getattr(self, name), 1, high)
        for name in ("qkv_bias", "out_bias", "mlp_bias", "tied_embeddings"):
            check_choice(name, getattr(self, name), (False, True))
        check_number("norm_eps", self.norm_eps, 1e-12, 1.0)
        check_choice("activation", self.activation, ("silu",))
        check_choice("dtype", self.dtype, DTYPES)
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim}; rope pairs its halves, so it must be even")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} KV heads evenly"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> DecoderSpec:
        rope = dict(data["rope"])
        scaling = RopeScaling(**rope["scaling"]) if rope["scaling"] else None
        return DecoderSpec(**{**data, "rope": RopeSpec(rope["theta"], scaling)})
