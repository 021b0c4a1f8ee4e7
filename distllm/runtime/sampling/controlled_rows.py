"""LogitControls on the device: the rows of a batch that change their logits, as tensors, and the changes.

Made once for a composition of a batch and applied in every step of it. Nothing here waits for the device but
the user's own processors. Called by the sampler alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
import torch

from distllm.kernels import penalize
from distllm.runtime.sampling.logit_controls import LogitControls
from distllm.runtime.sampling.logits_processors import NamedProcessor, ProcessorError
from distllm.runtime.staging import to_device

_Rows = list[tuple[int, LogitControls]]  # (row of the batch, its controls)


@dataclass(frozen=True)
class History:
    """The tokens that the rows of a batch have so far; all [num_rows] int64 but the table."""

    table: torch.Tensor  # [slots, max_model_len] int32
    slots: torch.Tensor
    lengths: torch.Tensor  # prompt and output
    num_prompt: torch.Tensor

    def take(self, rows: torch.Tensor) -> History:
        return History(self.table, self.slots[rows], self.lengths[rows], self.num_prompt[rows])

    def tokens_at(self, positions: torch.Tensor) -> torch.Tensor:
        """positions: [num_rows, n]. Beyond what there is, anything."""
        return self.table[self.slots[:, None], positions.clamp(0, self.table.shape[1] - 1)].long()


class _Control(Protocol):
    def apply(self, logits: torch.Tensor, history: History) -> None:
        """In place. logits: [num_rows, vocab_size] fp32, contiguous."""
        ...


class ControlledRows:
    def __init__(
        self,
        controls: Sequence[LogitControls | None],
        processors: Sequence[NamedProcessor],
        device: torch.device,
    ) -> None:
        """controls: of each row of the batch."""
        self.controls = list(controls)
        rows = [(row, entry) for row, entry in enumerate(controls) if entry is not None]
        self._applied: list[_Control] = [
            control
            for made in (_allowed, _bad_words, _ngrams, _bias, _penalties)
            for control in made(rows, device)
        ]
        self._processed = [
            _Processors(row, [processors[i] for i in c.processors]) for row, c in rows if c.processors
        ]

    def serves(self, controls: Sequence[LogitControls | None]) -> bool:
        """Whether it was made for these very rows."""
        same = len(controls) == len(self.controls)
        return same and all(mine is theirs for mine, theirs in zip(self.controls, controls, strict=True))

    def apply(self, logits: torch.Tensor, history: History) -> tuple[torch.Tensor, list[str]]:
        """logits: [num_rows, vocab_size], kept; the changed ones, fp32. And what went wrong in each row that
        has processors, or ""; such a row is as it was before them.
        """
        changed = logits.float() if logits.dtype != torch.float32 else logits.clone()
        changed = changed.contiguous()
        for control in self._applied:
            control.apply(changed, history)
        return changed, [each.try_apply(changed, history) for each in self._processed]


@dataclass(frozen=True)
class _Allowed:
    rows: torch.Tensor  # that allow some tokens only
    owners: torch.Tensor  # the row of each allowed token
    token_ids: torch.Tensor

    def apply(self, logits: torch.Tensor, history: History) -> None:
        kept = logits[self.owners, self.token_ids]
        logits.index_fill_(0, self.rows, -torch.inf)  # assigning a number would wait for the device
        logits[self.owners, self.token_ids] = kept


def _allowed(rows: _Rows, device: torch.device) -> list[_Control]:
    some = [(row, c.allowed_token_ids) for row, c in rows if c.allowed_token_ids]
    pairs = [(row, token_id) for row, ids in some for token_id in ids]
    return [_Allowed(_longs([row for row, _ in some], device), *_columns(pairs, device))] if some else []


@dataclass(frozen=True)
class _BadWords:
    """A word's last token is out where the tokens before it are the end of the output."""

    owners: torch.Tensor  # [num_words] rows
    last: torch.Tensor  # [num_words] token ids
    num_before: torch.Tensor  # [num_words]
    before: torch.Tensor  # [num_words, longest]: what comes before the last, the nearest first

    def apply(self, logits: torch.Tensor, history: History) -> None:
        known = history.take(self.owners)
        back = torch.arange(self.before.shape[1], device=logits.device)
        found = known.tokens_at(known.lengths[:, None] - 1 - back)
        equal = (found == self.before) | (back >= self.num_before[:, None])
        hit = equal.all(1) & (self.num_before <= known.lengths - known.num_prompt)
        # Two words may end alike: the least of all that is written stays.
        places = self.owners * logits.shape[1] + self.last
        limits = torch.where(hit, -torch.inf, torch.inf).to(logits.dtype)
        logits.view(-1).scatter_reduce_(0, places, limits, "amin")


def _bad_words(rows: _Rows, device: torch.device) -> list[_Control]:
    words = [(row, word) for row, c in rows for word in c.bad_words]
    if not words:
        return []
    longest = max(len(word) for _, word in words) - 1
    before = [[*word[-2::-1], *[0] * (longest + 1 - len(word))] for _, word in words]
    ends = [(row, word[-1], len(word) - 1) for row, word in words]
    table = _longs([token_id for line in before for token_id in line], device).view(len(words), longest)
    owners, last, num_before = _columns(ends, device)
    return [_BadWords(owners, last, num_before, table)]


@dataclass(frozen=True)
class _NGrams:
    """What has followed the last size − 1 tokens before is out."""

    size: int
    rows: torch.Tensor

    def apply(self, logits: torch.Tensor, history: History) -> None:
        if self.size > history.table.shape[1]:
            return  # no text is as long
        known, vocab_size = history.take(self.rows), logits.shape[1]
        tokens = known.table[known.slots].long()
        ends = torch.arange(self.size - 1, tokens.shape[1], device=logits.device)  # where an n-gram ends
        repeated = ends < known.lengths[:, None]
        for back in range(1, self.size):
            newest = known.tokens_at(known.lengths[:, None] - back)
            repeated &= tokens[:, self.size - 1 - back : tokens.shape[1] - back] == newest
        followed = torch.where(repeated, tokens[:, self.size - 1 :], vocab_size)
        out = torch.zeros(len(tokens), vocab_size + 1, dtype=torch.bool, device=logits.device)
        out.scatter_(1, followed, True)
        logits[self.rows] = logits[self.rows].masked_fill(out[:, :vocab_size], -torch.inf)


def _ngrams(rows: _Rows, device: torch.device) -> list[_Control]:
    sized = sorted((c.no_repeat_ngram_size, row) for row, c in rows if c.no_repeat_ngram_size)
    groups = groupby(sized, key=lambda pair: pair[0])
    return [_NGrams(size, _longs([row for _, row in pairs], device)) for size, pairs in groups]


@dataclass(frozen=True)
class _Bias:
    owners: torch.Tensor
    token_ids: torch.Tensor
    values: torch.Tensor

    def apply(self, logits: torch.Tensor, history: History) -> None:
        logits[self.owners, self.token_ids] += self.values  # no pair comes twice


def _bias(rows: _Rows, device: torch.device) -> list[_Control]:
    pairs = [(row, token_id) for row, c in rows for token_id, _ in c.logit_bias]
    values = [value for _, c in rows for _, value in c.logit_bias]
    if not pairs:
        return []
    owners, token_ids = _columns(pairs, device)
    return [_Bias(owners, token_ids, to_device(values, torch.float32, device))]


@dataclass(frozen=True)
class _Penalties:
    rows: torch.Tensor
    penalties: torch.Tensor  # [3, num_rows] fp32: repetition, presence, frequency

    def apply(self, logits: torch.Tensor, history: History) -> None:
        known = history.take(self.rows)
        texts = known.table, known.slots, known.lengths, known.num_prompt
        penalize(logits, self.rows, *texts, self.penalties)


def _penalties(rows: _Rows, device: torch.device) -> list[_Control]:
    some = [(row, c) for row, c in rows if c.has_penalty]
    if not some:
        return []
    values = [(c.repetition_penalty, c.presence_penalty, c.frequency_penalty) for _, c in some]
    columns = to_device(np.array(values).T, torch.float32, device)
    return [_Penalties(_longs([row for row, _ in some], device), columns)]


@dataclass(frozen=True)
class _Processors:
    """Python for one row: the host waits for the device."""

    row: int
    processors: list[NamedProcessor]

    def try_apply(self, logits: torch.Tensor, history: History) -> str:
        """In place, or what went wrong."""
        slot, length = int(history.slots[self.row]), int(history.lengths[self.row])
        token_ids = history.table[slot, :length].tolist()
        values = logits[self.row]
        try:
            for processor in self.processors:
                values = processor.apply(token_ids, values)
        except ProcessorError as error:
            return str(error)
        logits[self.row] = values
        return ""


def _longs(values: Sequence[int], device: torch.device) -> torch.Tensor:
    return to_device(values, torch.int64, device)


def _columns(entries: Sequence[tuple[int, ...]], device: torch.device) -> list[torch.Tensor]:
    """One tensor for each place of the entries."""
    return [_longs(column, device) for column in zip(*entries, strict=True)]
