"""The operations of a step as cases to time, at the shapes of one tensor-parallel rank of a model.

Says which bytes and which arithmetic each one needs. Tensors are made when a case is timed, not before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from distllm import kernels
from distllm.kernels.batch import TokenBatch
from distllm.models.moe_spec import MoESpec
from distllm.models.rope import rope_frequencies
from distllm.models.shards import EMBED, layer_linears, local_heads, local_kv_heads, shard_table
from distllm.models.spec import DecoderSpec
from distllm.ops.bench.timing import Call
from distllm.parallel.layout import RankLayout

BLOCK_SIZE = 64  # tokens of a KV block, EngineConfig's default
NUM_LOGPROBS = 5

MakeCall = Callable[[], Call]


@dataclass(frozen=True)
class Case:
    """One operation at one shape. make() returns a call on memory of its own."""

    operation: str
    shape: str
    num_bytes: int  # that must be read or written
    num_flop: int  # of matrix products; 0 where there are none
    make: MakeCall


class StepCases:
    """decode() and prefill() list the operations of such a step, in the order in which it runs them."""

    def __init__(self, spec: DecoderSpec, tp_size: int, dtype: torch.dtype, device: torch.device) -> None:
        layout = RankLayout(tp_size)
        self._spec, self._dtype, self._device = spec, dtype, device
        self._num_heads = _length(local_heads(spec, layout))
        self._num_kv_heads = _length(local_kv_heads(spec, layout))
        self._shapes = {shard.name: shard.shape for shard in shard_table(spec, layout)}
        kinds = {spec.layer_moe(layer): layer for layer in range(spec.num_layers)}
        self._mlp_layers = list(kinds.values())  # one with an MLP, one with experts, or both

    def decode(self, num_rows: int, context_len: int) -> Iterator[Case]:
        """num_rows sequences of context_len tokens, the new one included."""
        yield self._gather(num_rows, context_len)
        yield from self._layer(num_rows, 1, context_len)
        yield self._linear("head", num_rows, self._shapes[EMBED])
        yield self._sample(num_rows, truncated=False)
        yield self._lowest_kept(num_rows, top_k=20, top_p=1.0)
        yield self._lowest_kept(num_rows, top_k=0, top_p=0.9)
        yield self._sample(num_rows, truncated=True)
        yield self._logprobs(num_rows)

    def prefill(self, num_tokens: int) -> Iterator[Case]:
        """One prompt, whole."""
        yield from self._layer(1, num_tokens, num_tokens)

    def _layer(self, num_rows: int, tokens_per_row: int, seq_len: int) -> Iterator[Case]:
        n = num_rows * tokens_per_row
        yield self._embed(n)
        yield from self._norms(n)
        qkv, out = layer_linears(self._spec, 0)[:2]
        yield self._weight(qkv, n)
        yield self._rope(num_rows, tokens_per_row)
        yield self._attention(num_rows, tokens_per_row, seq_len)
        yield self._weight(out, n)
        for layer in self._mlp_layers:
            moe = self._spec.layer_moe(layer)
            yield from self._mlp(layer, n) if moe is None else self._moe(layer, moe, n)

    def _mlp(self, layer: int, n: int) -> Iterator[Case]:
        up, down = layer_linears(self._spec, layer)[2:]
        yield self._weight(up, n, layer)
        yield self._activation(n, self._shapes[f"layers.{layer}.{up}.weight"][0])
        yield self._weight(down, n, layer)

    def _moe(self, layer: int, moe: MoESpec, n: int) -> Iterator[Case]:
        (router,) = layer_linears(self._spec, layer)[2:]
        yield self._weight(router, n, layer)
        yield self._route(moe, n)
        yield self._expert_mlp(layer, moe, n)

    @cached_property
    def _embedding(self) -> torch.Tensor:
        """One for all: a lookup touches so little of it that copies would be gigabytes for nothing."""
        return self._random(*self._shapes[EMBED])

    def _embed(self, n: int) -> Case:
        shape = self._shapes[EMBED]

        def make() -> Call:
            token_ids = self._integers(shape[0], n)
            return lambda: kernels.embed(token_ids, self._embedding, 0)

        return self._case("embed", f"{n} of {_size(shape)}", 2 * n * shape[1], make)

    def _norms(self, n: int) -> Iterator[Case]:
        if self._spec.norm.kind == "layer":
            yield self._layer_norm(n)
        else:
            yield self._rms_norm(n)
            yield self._add_rms_norm(n)

    def _layer_norm(self, n: int) -> Case:
        shape = (n, self._spec.hidden_size)

        def make() -> Call:
            x, gain, bias = self._random(*shape), self._random(shape[1]), self._random(shape[1])
            return lambda: kernels.layer_norm(x, gain, bias, self._spec.norm.eps)

        return self._case("layer_norm", _size(shape), 2 * n * shape[1], make)

    def _rms_norm(self, n: int) -> Case:
        shape = (n, self._spec.hidden_size)

        def make() -> Call:
            x, gain = self._random(*shape), self._random(shape[1])
            return lambda: kernels.rms_norm(x, gain, self._spec.norm.eps)

        return self._case("rms_norm", _size(shape), 2 * n * shape[1], make)

    def _add_rms_norm(self, n: int) -> Case:
        shape = (n, self._spec.hidden_size)

        def make() -> Call:
            x, residual, gain = self._random(*shape), self._random(*shape), self._random(shape[1])
            return lambda: kernels.add_rms_norm(x, residual, gain, self._spec.norm.eps)

        return self._case("add_rms_norm", _size(shape), 4 * n * shape[1], make)

    def _weight(self, name: str, n: int, layer: int = 0) -> Case:
        return self._linear(name, n, self._shapes[f"layers.{layer}.{name}.weight"])

    def _linear(self, name: str, n: int, shape: tuple[int, ...]) -> Case:
        num_out, num_in = shape

        def make() -> Call:
            weight, x = self._random(*shape), self._random(n, num_in)
            return lambda: kernels.linear(x, weight)

        num_values = num_out * num_in + n * (num_in + num_out)
        return self._case(
            f"linear {name}", f"{n} × {num_in} → {num_out}", num_values, make, 2 * n * num_in * num_out
        )

    def _rope(self, num_rows: int, tokens_per_row: int) -> Case:
        """At the start of a context: the place is the same work everywhere, and needs the fewest blocks."""
        n, head_dim = num_rows * tokens_per_row, self._spec.head_dim
        heads = (self._num_heads, self._num_kv_heads, head_dim)
        width = (self._num_heads + 2 * self._num_kv_heads) * head_dim

        def make() -> Call:
            qkv, batch = self._random(n, width), self._batch(num_rows, tokens_per_row, tokens_per_row)
            cache = self._kv_cache_layer(num_rows, tokens_per_row)
            cos_sin = kernels.rope_cos_sin(
                rope_frequencies(self._spec.rope, head_dim, tokens_per_row).to(self._device), batch.positions
            )
            return lambda: kernels.rope_and_cache_kv(qkv, cos_sin, batch, cache, *heads)

        return self._case("rope_and_cache_kv", f"{n} × {width}", 2 * n * width, make)

    def _attention(self, num_rows: int, tokens_per_row: int, seq_len: int) -> Case:
        n, head_dim = num_rows * tokens_per_row, self._spec.head_dim

        def make() -> Call:
            q, batch = (
                self._random(n, self._num_heads, head_dim),
                self._batch(num_rows, tokens_per_row, seq_len),
            )
            cache = self._kv_cache_layer(num_rows, seq_len)
            return lambda: kernels.paged_attention(q, cache, batch, head_dim**-0.5)

        kv_values = num_rows * seq_len * 2 * self._num_kv_heads * head_dim
        num_values = kv_values + 2 * n * self._num_heads * head_dim
        pairs = n * (2 * seq_len - tokens_per_row + 1) // 2  # causal: each token sees those before it
        shape = f"{num_rows} × {tokens_per_row} of {seq_len}"
        return self._case("paged_attention", shape, num_values, make, 4 * pairs * self._num_heads * head_dim)

    def _activation(self, n: int, width: int) -> Case:
        spec = self._spec
        operation = kernels.activate_mul if spec.gated else kernels.activate

        def make() -> Call:
            x = self._random(n, width)
            return lambda: operation(x, spec.activation)

        num_values = n * width * 3 // 2 if spec.gated else 2 * n * width
        return self._case("activation", _size((n, width)), num_values, make)

    def _route(self, moe: MoESpec, n: int) -> Case:
        shape = (n, moe.num_experts)

        def make() -> Call:
            logits = self._random(*shape)
            return lambda: kernels.route(logits, moe.top_k, renormalize=moe.renormalize)

        num_bytes = shape[0] * shape[1] * self._dtype.itemsize + n * moe.top_k * (4 + 8)
        return Case("route", f"{moe.top_k} of {_size(shape)}", num_bytes, 0, make)

    def _expert_mlp(self, layer: int, moe: MoESpec, n: int) -> Case:
        """Tokens spread evenly: training aims at it, and the number of experts to read is known."""
        gate_up, down = (self._shapes[f"layers.{layer}.moe.{name}.weight"] for name in ("gate_up", "down"))

        def make() -> Call:
            weights, x = (self._random(*gate_up), self._random(*down)), self._random(n, gate_up[2])
            pairs = torch.arange(n * moe.top_k, device=self._device)
            experts = (pairs % moe.num_experts).view(n, moe.top_k)
            shares = torch.full(experts.shape, 1 / moe.top_k, device=self._device)
            return lambda: kernels.expert_mlp(x, *weights, shares, experts)

        expert_values = math.prod(gate_up[1:]) + math.prod(down[1:])
        num_pairs = n * moe.top_k
        num_values = min(moe.num_experts, num_pairs) * expert_values + 2 * n * gate_up[2]
        shape = f"{n} × {moe.top_k} of {moe.num_experts} × {gate_up[2]} → {down[2]}"
        return self._case("expert_mlp", shape, num_values, make, 2 * num_pairs * expert_values)

    def _gather(self, num_rows: int, context_len: int) -> Case:
        table = self._block_table(num_rows, context_len)

        def make() -> Call:
            computed = torch.full((num_rows,), context_len - 1, device=self._device)
            slots = torch.arange(num_rows, device=self._device)
            starts = torch.arange(num_rows + 1, dtype=torch.int32, device=self._device)
            return lambda: kernels.gather_batch(
                computed, table, slots, starts, num_rows, BLOCK_SIZE, num_rows
            )

        num_bytes = 2 * table.nbytes + num_rows * 8 * 5  # slots, lengths, positions, mapping, owners
        return Case("gather_batch", f"{num_rows} of {context_len}", num_bytes, 0, make)

    def _sample(self, num_rows: int, *, truncated: bool) -> Case:
        def make() -> Call:
            logits, temperature, *truncation = self._truncation(num_rows, top_k=20, top_p=1.0)
            lowest = kernels.lowest_kept(logits, temperature, *truncation) if truncated else None
            seed, positions = (self._column(num_rows, value) for value in (1, 100))
            return lambda: kernels.sample_tokens(logits, temperature, seed, positions, lowest)

        return self._logits_case("sample_tokens" + (" truncated" if truncated else ""), num_rows, make)

    def _lowest_kept(self, num_rows: int, *, top_k: int, top_p: float) -> Case:
        def make() -> Call:
            options = self._truncation(num_rows, top_k=top_k, top_p=top_p)
            return lambda: kernels.lowest_kept(*options)

        return self._logits_case("lowest_kept " + ("top-k" if top_k else "top-p"), num_rows, make)

    def _truncation(self, num_rows: int, *, top_k: int, top_p: float) -> tuple[torch.Tensor, ...]:
        """The arguments of lowest_kept."""
        columns = (self._column(num_rows, value) for value in (0.8, top_k, top_p, 0.0))
        return self._logits(num_rows), *columns

    def _logprobs(self, num_rows: int) -> Case:
        def make() -> Call:
            logits, token_ids = self._logits(num_rows), self._integers(self._spec.vocab_size, num_rows)
            return lambda: kernels.token_logprobs(logits, token_ids, NUM_LOGPROBS)

        return self._logits_case("token_logprobs", num_rows, make)

    def _case(self, operation: str, shape: str, num_values: int, make: MakeCall, num_flop: int = 0) -> Case:
        return Case(operation, shape, num_values * self._dtype.itemsize, num_flop, make)

    def _logits_case(self, operation: str, num_rows: int, make: MakeCall) -> Case:
        shape = (num_rows, self._spec.vocab_size)
        return self._case(operation, _size(shape), shape[0] * shape[1], make)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self._dtype, device=self._device)

    def _integers(self, below: int, n: int) -> torch.Tensor:
        return torch.randint(below, (n,), device=self._device)

    def _logits(self, num_rows: int) -> torch.Tensor:
        """About as far apart as those of a trained model: how long a border takes to find depends on it."""
        return 3 * self._random(num_rows, self._spec.vocab_size)

    def _column(self, num_rows: int, value: float) -> torch.Tensor:
        dtype = torch.int64 if isinstance(value, int) else torch.float32
        return torch.full((num_rows,), value, dtype=dtype, device=self._device)

    def _kv_cache_layer(self, num_rows: int, seq_len: int) -> torch.Tensor:
        num_blocks = num_rows * _num_blocks(seq_len)
        return self._random(2, num_blocks, BLOCK_SIZE, self._num_kv_heads, self._spec.head_dim)

    def _block_table(self, num_rows: int, seq_len: int) -> torch.Tensor:
        """Blocks in random order, as an engine that has run for a while hands them out."""
        shape = (num_rows, _num_blocks(seq_len))
        return torch.randperm(shape[0] * shape[1], dtype=torch.int32, device=self._device).view(shape)

    def _batch(self, num_rows: int, tokens_per_row: int, seq_len: int) -> TokenBatch:
        """The last tokens_per_row tokens of rows that are all seq_len long."""
        row = torch.arange(num_rows + 1, dtype=torch.int32, device=self._device)
        positions = torch.arange(seq_len - tokens_per_row, seq_len, device=self._device)
        table = self._block_table(num_rows, seq_len)
        slots = table[:, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        return TokenBatch(
            positions=positions.repeat(num_rows),
            slot_mapping=slots.flatten(),
            cu_seqlens_q=row * tokens_per_row,
            seq_lens=torch.full_like(row[1:], seq_len),
            block_table=table,
            num_decodes=num_rows if tokens_per_row == 1 else 0,
        )


def _num_blocks(seq_len: int) -> int:
    return -(-seq_len // BLOCK_SIZE)


def _size(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]
