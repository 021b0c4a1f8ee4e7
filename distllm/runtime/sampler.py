"""Sampler: logits of the last stage to token ids and log-probabilities, by the slot tables' parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distllm.kernels import keep_typical, lowest_kept, sample_tokens, token_logprobs
from distllm.parallel.vocab import VocabParallelHead
from distllm.runtime.controlled_rows import ControlledRows, History, LogitsProcessor
from distllm.runtime.plan import RowSampling
from distllm.runtime.slots import SlotTables
from distllm.runtime.staging import to_device


@dataclass(frozen=True)
class Sampled:
    """The tokens of one step, in the order of plan.sampled_slots; on the device until rank 0 reads them."""

    token_ids: torch.Tensor  # [n] int64
    logprobs: torch.Tensor | None = None  # [n, 2 + num_top] fp32: the token's, its rank, the best ones'
    top_ids: torch.Tensor | None = None  # [n, num_top] int64

    @staticmethod
    def empty(num_rows: int, num_top: int, device: torch.device) -> Sampled:
        """Room to receive num_rows results; num_top is −1 where no row asks for log-probabilities."""
        token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
        if num_top < 0:
            return Sampled(token_ids)
        return Sampled(
            token_ids,
            torch.empty(num_rows, 2 + num_top, dtype=torch.float32, device=device),
            torch.empty(num_rows, num_top, dtype=torch.int64, device=device),
        )

    @property
    def parts(self) -> list[torch.Tensor]:
        """token_ids, and logprobs and top_ids where a row asked for them."""
        return [part for part in (self.token_ids, self.logprobs, self.top_ids) if part is not None]

    @property
    def messages(self) -> list[torch.Tensor]:
        """What travels from the last stage to the first, in order. Empty tensors do not travel."""
        return [part for part in self.parts if part.numel()]


class Sampler:
    """The last stage's. Every tensor-parallel rank calls it alike and gets the same tokens.

    Rows that are plain (RowSampling.is_plain) are chosen where their logits lie, and only the best of each
    rank travel; the others need all logits on every rank.
    """

    def __init__(
        self, head: VocabParallelHead, tables: SlotTables, processors: Sequence[LogitsProcessor] = ()
    ) -> None:
        """processors: what LogitControls.processors counts."""
        self._head = head
        self._tables = tables
        self._processors = processors
        self._controlled: ControlledRows | None = None  # of the last batch that had some

    def sample(self, shard: torch.Tensor, slots: list[int], positions: torch.Tensor) -> Sampled:
        """One token for each row of the head's logits; positions [n] int64 are those of the new tokens.

        Collective: one all_gather by every rank of tp.
        """
        index = to_device(slots, torch.int64, shard.device)
        if not self._tables.special_rows(slots):
            return Sampled(self.sample_plain(shard, index, positions))
        rows = [self._tables.sampling[slot] for slot in slots]
        logits, parameters = self._head.gather(shard), self._tables.parameters(index)
        history = History(self._tables.token_ids, index, positions, parameters["num_prompt"])
        token_ids = _choose(self._control(logits, rows, history), rows, positions, parameters)
        return _with_logprobs(logits, token_ids, num_top_logprobs(rows))

    def sample_plain(self, shard: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As sample(), of plain rows: [n] int64. Decides nothing on the host, so it can be captured."""
        parameters = self._tables.parameters(slots)
        return self._head.best_tokens(shard, parameters["temperature"], parameters["seed"], positions)

    def _control(self, logits: torch.Tensor, rows: list[RowSampling], history: History) -> torch.Tensor:
        controls = [row.controls for row in rows]
        if not any(controls):
            return logits
        if self._controlled is None or not self._controlled.serves(controls):
            self._controlled = ControlledRows(controls, self._processors, logits.device)
        return self._controlled.apply(logits, history)


def _choose(
    logits: torch.Tensor,
    rows: list[RowSampling],
    positions: torch.Tensor,
    parameters: dict[str, torch.Tensor],
) -> torch.Tensor:
    allowed = forbid_early_stop(logits, rows, positions - parameters["num_prompt"])
    temperature, lowest = parameters["temperature"], None
    if any(row.truncates for row in rows):
        lowest = lowest_kept(allowed, temperature, *(parameters[n] for n in ("top_k", "top_p", "min_p")))
    allowed = _typical(allowed, rows, temperature, lowest)
    return sample_tokens(allowed, temperature, parameters["seed"], positions, lowest)


def _typical(
    logits: torch.Tensor, rows: list[RowSampling], temperature: torch.Tensor, lowest: torch.Tensor | None
) -> torch.Tensor:
    """Only rows that ask for it are touched; the input is kept."""
    some = [(i, row.typical_p) for i, row in enumerate(rows) if row.typical_p < 1]
    if not some:
        return logits
    numbers, masses = zip(*some, strict=True)
    index = to_device(numbers, torch.int64, logits.device)
    mass = to_device(masses, torch.float32, logits.device)
    kept = keep_typical(
        logits[index].float(), temperature[index], None if lowest is None else lowest[index], mass
    )
    return logits.index_copy(0, index, kept.to(logits.dtype))


def num_top_logprobs(rows: list[RowSampling]) -> int:
    """The most that any row asks for; −1 if none does. The same on every rank."""
    return max((row.num_logprobs for row in rows), default=-1)


def forbid_early_stop(
    logits: torch.Tensor, rows: list[RowSampling], num_generated: torch.Tensor
) -> torch.Tensor:
    """logits with the stop tokens of rows that have fewer than min_tokens set to −inf; the input is kept."""
    stops = [
        (i, t, row.min_tokens) for i, row in enumerate(rows) if row.min_tokens > 0 for t in row.stop_token_ids
    ]
    if not stops:
        return logits
    index, token_ids, min_tokens = (
        to_device(part, torch.int64, logits.device) for part in zip(*stops, strict=True)
    )
    logits = logits.clone()
    early = num_generated[index] < min_tokens
    logits[index, token_ids] = torch.where(early, -torch.inf, logits[index, token_ids])
    return logits


def _with_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> Sampled:
    if num_top < 0:
        return Sampled(token_ids)
    chosen, rank, top_ids, top_logprobs = token_logprobs(logits, token_ids, num_top)
    return Sampled(token_ids, torch.cat([chosen[:, None], rank[:, None].float(), top_logprobs], 1), top_ids)
