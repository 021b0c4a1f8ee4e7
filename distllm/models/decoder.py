"""The decoder: one forward pass for every family, on one rank's share of the weights.

Knows a spec, a layout and the tensor-parallel communicator; never requests, plans or other stages. Between
stages one tensor travels, [num_tokens, hidden_size]: hidden states with the residual already added.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distllm.comm.base import TensorComm
from distllm.kernels import rope_cos_sin
from distllm.kernels.batch import TokenBatch
from distllm.models.assembly import Weights, make_embedding_norm, make_head, make_layers
from distllm.models.rope import rope_frequencies, rope_multiplier
from distllm.models.shards import EMBED, POSITIONS, local_kv_heads, stage_layers
from distllm.models.spec import DecoderSpec
from distllm.parallel.layout import RankLayout
from distllm.parallel.stream import Stream
from distllm.parallel.vocab import VocabParallelEmbedding


class Decoder:
    """This rank's part of the model. weights: the tensors of shard_table(spec, layout), by name; theirs is
    the memory that it uses.

    max_model_len: the longest sequence that will run; some ropes are fixed by it.
    """

    def __init__(
        self, spec: DecoderSpec, layout: RankLayout, weights: Weights, tp: TensorComm, max_model_len: int
    ) -> None:
        assert (tp.size, tp.rank) == (layout.tp_size, layout.tp_rank), "tp communicator of another stage"
        self.spec, self.layout, self.tp = spec, layout, tp
        ropes = list(dict.fromkeys(spec.layer_rope(n) for n in stage_layers(spec, layout)))
        self.layers = make_layers(spec, layout, weights, tp, ropes)
        device = self.layers[0].attn.qkv.weight.device
        self._rotations = [
            (rope_frequencies(rope, spec.head_dim, max_model_len).to(device), rope_multiplier(rope))
            for rope in ropes
        ]
        if layout.is_first_stage:
            # Rounded as transformers does: models were trained with the rounded one.
            scale = torch.tensor(spec.embedding_scale, dtype=weights[EMBED].dtype).item()
            self.embedding = VocabParallelEmbedding(weights[EMBED], tp, scale)
            self._positions = weights.get(POSITIONS)
            self._embedding_norm = make_embedding_norm(spec, weights)
        if layout.is_last_stage:
            self.head = make_head(spec, weights, tp)

    def kv_cache_shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """[layers of this stage, keys and values, blocks, tokens, KV heads of this rank, head_dim].

        Allocate it filled with zeros: attention multiplies unwritten places by zero, and 0 · NaN is NaN.
        """
        first, last = local_kv_heads(self.spec, self.layout)
        return (len(self.layers), 2, num_blocks, block_size, last - first, self.spec.head_dim)

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """First stage only. token_ids, positions: [num_tokens] int. Returns [num_tokens, hidden_size].

        Collective: every rank of tp, one all_reduce.
        """
        hidden = self.embedding(token_ids)
        if self._positions is not None:
            hidden += F.embedding(positions + (self.spec.learned_positions or 0), self._positions)
        return hidden if self._embedding_norm is None else self._embedding_norm(hidden)

    def forward(self, hidden: torch.Tensor, batch: TokenBatch, kv_cache: torch.Tensor) -> torch.Tensor:
        """This stage's layers. hidden: [num_tokens, hidden_size], may be written over; returns the same
        shape.

        Writes the KV of the batch's tokens into kv_cache (kv_cache_shape). Collective: every rank of tp, two
        all_reduces per layer.
        """
        cos_sin = [rope_cos_sin(freqs, batch.positions, by) for freqs, by in self._rotations]
        stream = Stream(hidden)
        next_norms = [*(layer.norm for layer in self.layers[1:]), None]
        for layer, next_norm, kv_cache_layer in zip(self.layers, next_norms, kv_cache, strict=True):
            stream = layer(stream, cos_sin[layer.rotation], batch, kv_cache_layer, next_norm)
        return stream.hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last stage only. hidden: [num_rows, hidden_size], of the rows that sample.

        Returns [num_rows, vocab_size] in their dtype on every rank of tp. Collective: all of them, one
        all_gather.
        """
        return self.head.gather(self.head(hidden))
