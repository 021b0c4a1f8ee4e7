"""The two ends of a model, cut by vocabulary rows (`vocab_shard`): the embedding and the output head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from distllm.comm.base import TensorComm
from distllm.kernels import best_tokens, choose_best, embed, linear
from distllm.parallel.stream import Norm, Stream


@dataclass(frozen=True)
class VocabParallelEmbedding:
    """Token ids → hidden states. weight: [rows, hidden_size], as many rows on every rank."""

    weight: torch.Tensor
    tp: TensorComm
    scale: float = 1.0  # of every row

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids: [num_tokens] int. Returns [num_tokens, hidden_size] on every rank.

        Collective: one all_reduce by every rank of tp. Each row has one addend that is not zero, so the sum
        is exact.
        """
        rows = self._rows(token_ids)
        return rows if self.scale == 1.0 else rows.mul_(self.scale)

    def _rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return F.embedding(token_ids, self.weight)
        first_row = self.tp.rank * self.weight.shape[0]
        return self.tp.all_reduce(embed(token_ids, self.weight, first_row))


@dataclass(frozen=True)
class VocabParallelHead:
    """Hidden states → logits, through the final norm. weight: [rows, hidden_size], as in
    VocabParallelEmbedding; the last rank's last rows may be padding.
    """

    weight: torch.Tensor
    norm: Norm
    vocab_size: int  # without padding
    tp: TensorComm
    scale: float = 1.0  # of the logits
    softcap: float = 0.0  # c: logits become c · tanh(logits / c), after the scale; 0: they stay

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [num_rows, hidden_size]. Returns this rank's logits, [num_rows, rows], in its dtype."""
        x, norm = Stream(hidden).read(self.norm)
        logits = linear(x, self.weight, norm=norm)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else logits

    def gather(self, shard: torch.Tensor) -> torch.Tensor:
        """The logits of all ranks, [num_rows, vocab_size]. shard: of __call__.

        Collective: one all_gather of [num_rows, rows] by every rank of tp.
        """
        if self.tp.size > 1:
            shard = self.tp.all_gather(shard.contiguous()).transpose(0, 1).flatten(1)
        return shard[:, : self.vocab_size]

    def best_tokens(
        self, shard: torch.Tensor, temperature: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """sample_tokens over the logits of all ranks, [num_rows] int64; only the best of each rank travel.

        Collective: one all_gather of [2, num_rows] float64 by every rank of tp.
        """
        first = self.tp.rank * self.weight.shape[0]
        own = shard[:, : max(0, self.vocab_size - first)]
        scores, token_ids = best_tokens(own, temperature, seed, positions, first_entry=first)
        if self.tp.size == 1:
            return token_ids
        every = self.tp.all_gather(torch.stack((scores.double(), token_ids.double())))  # both exact
        return choose_best(every[:, 0].float(), every[:, 1].long())
