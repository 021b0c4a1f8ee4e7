"""The two ends of a model, cut by vocabulary rows (`vocab_shard`): the embedding and the output head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from distllm.comm.base import TensorComm
from distllm.kernels import embed, linear
from distllm.parallel.linear import Norm


@dataclass(frozen=True)
class VocabParallelEmbedding:
    """Token ids → hidden states. weight: [rows, hidden_size], as many rows on every rank."""

    weight: torch.Tensor
    tp: TensorComm

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids: [num_tokens] int. Returns [num_tokens, hidden_size] on every rank.

        Collective: one all_reduce by every rank of tp. Each row has one addend that is not zero, so the sum
        is exact.
        """
        if self.tp.size == 1:
            return F.embedding(token_ids, self.weight)
        first_row = self.tp.rank * self.weight.shape[0]
        return self.tp.all_reduce(embed(token_ids, self.weight, first_row))


@dataclass(frozen=True)
class VocabParallelHead:
    """Hidden states → logits, through the final norm. weight: [rows, hidden_size], as in
    VocabParallelEmbedding.
    """

    weight: torch.Tensor
    norm: Norm
    vocab_size: int  # without padding
    tp: TensorComm

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [num_rows, hidden_size]. Returns [num_rows, vocab_size], in hidden's dtype, on every rank.

        Collective: one all_gather of [num_rows, rows] by every rank of tp.
        """
        logits = linear(hidden, self.weight, norm=self.norm)
        if self.tp.size > 1:
            logits = self.tp.all_gather(logits).transpose(0, 1).flatten(1)
        return logits[:, : self.vocab_size]
