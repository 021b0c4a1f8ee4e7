"""DecoderSpec: everything that a decoder-only family can vary, as data. Built by a family from config.json.

Checks its own bounds, since its numbers come from files. Knows no tensor and no rank. The torch decoder,
the shard table, `distllm plan` and the engine format read it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from distllm.errors import CheckpointError
from distllm.models.checks import check_choice, check_int, check_number
from distllm.models.moe_spec import MoESpec
from distllm.models.rope_spec import MAX_POSITION, RopeSpec

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = get_args(DType)
DTYPE_BYTES: dict[DType, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

# Generous for any model known, small enough that a damaged file cannot ask for absurd amounts of memory.
_INT_LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "num_layers": 2**12,
    "num_heads": 2**12,
    "num_kv_heads": 2**12,
    "head_dim": 2**12,
    "intermediate_size": 2**20,
    "max_position_embeddings": MAX_POSITION,
}
_FLAGS = (
    "qkv_bias", "out_bias", "mlp_bias", "tied_embeddings", "gated", "qk_norm", "post_norms", "embedding_norm",
    "normalized_head",
)  # fmt: skip
_SCALES = ("attention_scale", "alibi_scale", "embedding_scale", "logit_scale")


@dataclass(frozen=True)
class NormSpec:
    """Every norm of the model. rms has a gain, layer a gain and a bias."""

    kind: Literal["rms", "layer"]
    eps: float
    plus_one: bool = False  # the gain is 1 + the stored weight

    def __post_init__(self) -> None:
        check_choice("norm", self.kind, ("rms", "layer"))
        check_number("norm eps", self.eps, 1e-12, 1.0)
        check_choice("norm plus_one", self.plus_one, (False, True))


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only transformer with norms before attention and MLP. Defaults are Llama's."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    activation: Activation
    norm: NormSpec
    rope: RopeSpec | None
    qkv_bias: bool
    out_bias: bool  # of the attention's output projection
    mlp_bias: bool
    tied_embeddings: bool
    max_position_embeddings: int  # the longest sequence, in tokens
    dtype: DType  # of the checkpoint
    gated: bool = True  # MLP: activation(gate) · up, or activation(up)
    moe: MoESpec | None = None  # experts in place of the MLP
    residual: Literal["sequential", "parallel", "parallel_shared"] = "sequential"  # parallel: attention and
    # MLP read the same stream, through a norm each or one that they share
    post_norms: bool = False  # of what attention and MLP add to the stream
    embedding_norm: bool = False
    qk_norm: bool = False  # RMSNorm of each head of q and k, before rope
    attention_scale: float | None = None  # of q kᵀ; None: 1 / √head_dim
    attention_softcap: float = 0.0  # 0: none
    windows: tuple[int, ...] = ()  # tokens that each layer sees, its own included; 0, or (): all
    window_rope: RopeSpec | None = None  # of the layers with a window, where theirs is another
    alibi_scale: float | None = None  # of the slopes; None: no alibi
    learned_positions: int | None = None  # position p is row p + this of a table; None: no table
    embedding_scale: float = 1.0  # rounded to the weights' dtype
    normalized_head: bool = False  # the output head's rows have length 1
    logit_scale: float = 1.0
    logit_softcap: float = 0.0  # 0: none

    def __post_init__(self) -> None:
        for name, high in _INT_LIMITS.items():
            check_int(name, getattr(self, name), 1, high)
        for name in _FLAGS:
            check_choice(name, getattr(self, name), (False, True))
        for name in _SCALES:
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 1e-6, 1e6)
        for name in ("attention_softcap", "logit_softcap"):
            check_number(name, getattr(self, name), 0.0, 1e6)
        check_choice("activation", self.activation, get_args(Activation))
        check_choice("residual", self.residual, ("sequential", "parallel", "parallel_shared"))
        check_choice("dtype", self.dtype, DTYPES)
        self._check_heads()
        self._check_layers()
        self._check_experts()

    def _check_heads(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} KV heads evenly"
            )
        for rope in (self.rope, self.window_rope):
            if rope is not None:
                rope.check_head(self.head_dim)

    def _check_layers(self) -> None:
        if len(self.windows) not in (0, self.num_layers):
            raise CheckpointError(f"{len(self.windows)} windows for {self.num_layers} layers")
        for window in self.windows:
            check_int("sliding_window", window, 0, MAX_POSITION)
        if self.learned_positions is not None:
            check_int("learned_positions", self.learned_positions, 0, 1024)
        if self.normalized_head and self.tied_embeddings:
            raise CheckpointError("a normalized head cannot be tied to the embedding, which stays as it is")

    def _check_experts(self) -> None:
        if self.moe is None:
            return
        check_choice("the experts' activation", self.activation, ("silu",))
        check_choice("the experts' gated", self.gated, (True,))
        check_choice("the experts' mlp_bias", self.mlp_bias, (False,))

    def window(self, layer: int) -> int:
        """Tokens that this layer sees; 0: all."""
        return self.windows[layer] if self.windows else 0

    def layer_rope(self, layer: int) -> RopeSpec | None:
        return self.window_rope if self.window_rope and self.window(layer) else self.rope

    def layer_moe(self, layer: int) -> MoESpec | None:
        """The experts of this layer; None: it has an MLP."""
        return None if self.moe is None or layer in self.moe.dense_layers else self.moe

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> DecoderSpec:
        """The spec of to_dict(), also after a way through JSON, which makes lists of tuples."""
        ropes = {
            name: None if data[name] is None else RopeSpec.from_dict(data[name])
            for name in ("rope", "window_rope")
        }
        moe = None if data["moe"] is None else MoESpec.from_dict(data["moe"])
        nested = {"norm": NormSpec(**data["norm"]), "windows": tuple(data["windows"]), "moe": moe, **ropes}
        return DecoderSpec(**{**data, **nested})
