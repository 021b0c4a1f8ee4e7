"""MoESpec: what a mixture of experts can vary, as data. Part of a DecoderSpec; knows no tensor, no rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distllm.models.checks import check_choice, check_int

MAX_EXPERTS = 2**12
MAX_LAYERS = 2**12


@dataclass(frozen=True)
class MoESpec:
    """Gated MLPs in place of one, without biases. A token goes to the top_k largest of a softmax over all
    experts, with those as its shares.
    """

    num_experts: int
    top_k: int
    intermediate_size: int  # of one expert
    renormalize: bool  # a token's shares sum to 1, as of a softmax over the chosen logits alone
    dense_layers: tuple[int, ...] = ()  # these have an MLP of the model's own width all the same

    def __post_init__(self) -> None:
        check_int("num_experts", self.num_experts, 1, MAX_EXPERTS)
        check_int("num_experts_per_tok", self.top_k, 1, self.num_experts)
        check_int("the experts' intermediate_size", self.intermediate_size, 1, 2**20)
        check_choice("norm_topk_prob", self.renormalize, (False, True))
        for layer in self.dense_layers:
            check_int("a dense layer", layer, 0, MAX_LAYERS - 1)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> MoESpec:
        """Of a DecoderSpec's to_dict(), also after a way through JSON."""
        return MoESpec(**{**data, "dense_layers": tuple(data["dense_layers"])})
