"""The least time that a decode step or a prompt can take: bytes over bandwidth, or arithmetic if longer.

Pure arithmetic on a spec, a layout and measured ceilings. Messages between ranks, activations and launches
count nothing here, so no engine can reach a floor; but tokens are taken to choose experts evenly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from distllm.models.shards import EMBED, head_name, local_heads, local_kv_heads, shard_table, stage_layers
from distllm.models.spec import DecoderSpec
from distllm.parallel.layout import RankLayout


@dataclass(frozen=True)
class Ceilings:
    """What this device does at best, measured in the same run."""

    read_bytes_per_s: float  # a stream that is only read
    flop_per_s: float  # a large product of square matrices

    def least_s(self, num_bytes: int, num_flop: int) -> float:
        """The longer of reading or writing num_bytes and computing num_flop."""
        return max(num_bytes / self.read_bytes_per_s, num_flop / self.flop_per_s)


@dataclass(frozen=True)
class ExpertCost:
    """The experts of a stage, all layers."""

    num_experts: int
    top_k: int
    weight_bytes: int  # of all of them

    def read_bytes(self, num_tokens: int) -> float:
        """Of the experts that so many tokens are likely to touch: each leaves out num_experts - top_k."""
        return self.weight_bytes * (1 - (1 - self.top_k / self.num_experts) ** num_tokens)


@dataclass(frozen=True)
class StageCost:
    """What one rank of a stage reads and computes. The first tp rank's share, which no other exceeds."""

    weight_bytes: int  # read by every step: all but experts, and the embedding's rows that no token asks for
    layer_params: int  # of matrices that a token is multiplied with; of experts, those that it goes to
    head_params: int  # multiplied with every token that samples
    kv_bytes_per_token: int
    attention_flop_per_pair: int  # of a query and a key, all layers
    experts: ExpertCost | None = None

    def read_bytes(self, num_tokens: int) -> float:
        """Weights that a step of so many tokens reads."""
        return self.weight_bytes + (self.experts.read_bytes(num_tokens) if self.experts else 0)


def stage_costs(spec: DecoderSpec, tp_size: int, pp_size: int, dtype_bytes: int) -> list[StageCost]:
    grid = RankLayout(tp_size, pp_size)
    return [_stage_cost(spec, grid.at(stage * tp_size), dtype_bytes) for stage in range(pp_size)]


def _stage_cost(spec: DecoderSpec, layout: RankLayout, dtype_bytes: int) -> StageCost:
    shapes = {shard.name: shard.shape for shard in shard_table(spec, layout)}
    head = math.prod(shapes[head_name(spec)]) if layout.is_last_stage else 0
    layers = [shape for name, shape in shapes.items() if name not in (EMBED, head_name(spec))]
    by_dims = [sum(math.prod(shape) for shape in layers if len(shape) == dims) for dims in (1, 2, 3)]
    vectors, matrices, stacks = by_dims  # only experts are stacks
    experts = ExpertCost(spec.moe.num_experts, spec.moe.top_k, stacks * dtype_bytes) if spec.moe else None
    num_layers = len(stage_layers(spec, layout))
    return StageCost(
        weight_bytes=(vectors + matrices + head) * dtype_bytes,
        layer_params=matrices + (stacks * experts.top_k // experts.num_experts if experts else 0),
        head_params=head,
        kv_bytes_per_token=2
        * num_layers
        * _length(local_kv_heads(spec, layout))
        * spec.head_dim
        * dtype_bytes,
        attention_flop_per_pair=4 * num_layers * _length(local_heads(spec, layout)) * spec.head_dim,
        experts=experts,
    )


@dataclass(frozen=True)
class Floors:
    """An engine's limits on this device: what its stages must do, over what the device can do."""

    costs: list[StageCost]
    ceilings: Ceilings

    def decode_step_s(self, batch_size: int, context_len: float) -> float:
        """One token for each of batch_size sequences of context_len tokens.

        With stages, the batch is cut into as many microbatches: a stage is never idle, but reads its weights
        for each of them.
        """
        rows = -(-batch_size // len(self.costs))
        return sum(self._decode_stage_s(cost, rows, context_len) for cost in self.costs)

    def first_token_s(self, num_tokens: int) -> float:
        """One prompt alone, from its first stage to its first token."""
        return sum(
            max(self._weights_s(cost, num_tokens), self._prefill_s(cost, num_tokens)) for cost in self.costs
        )

    def output_tokens_per_s(self, batch_size: int, input_len: int, output_len: int) -> float:
        """The most: batch_size sequences always running, and prompts packed without loss."""
        decode_s = self.decode_step_s(batch_size, input_len + output_len / 2) / batch_size
        prefill_s = max(self._prefill_s(cost, input_len) for cost in self.costs)
        return 1 / (decode_s + prefill_s / output_len)

    def _decode_stage_s(self, cost: StageCost, rows: int, context_len: float) -> float:
        arithmetic_s = 2 * (cost.layer_params + cost.head_params) * rows / self.ceilings.flop_per_s
        kv_s = rows * context_len * cost.kv_bytes_per_token / self.ceilings.read_bytes_per_s
        return max(self._weights_s(cost, rows), arithmetic_s) + kv_s

    def _weights_s(self, cost: StageCost, num_tokens: int) -> float:
        return cost.read_bytes(num_tokens) / self.ceilings.read_bytes_per_s

    def _prefill_s(self, cost: StageCost, num_tokens: int) -> float:
        """Every token through the layers, the last one through the head; half of all pairs are causal."""
        linear = 2 * (cost.layer_params * num_tokens + cost.head_params)
        attention = cost.attention_flop_per_pair * num_tokens**2 / 2
        return (linear + attention) / self.ceilings.flop_per_s


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]
