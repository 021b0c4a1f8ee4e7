"""Sampler: logits of the last stage to token ids and log-probabilities, by the slot tables' parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distllm.kernels import keep_typical, lowest_kept, sample_tokens, token_logprobs
from distllm.parallel.vocab import VocabParallelHead
from distllm.runtime.plan import RowSampling, mask_bytes
from distllm.runtime.sampling.controlled_rows import ControlledRows, History
from distllm.runtime.sampling.logit_controls import LogitControls
from distllm.runtime.sampling.logits_processors import NamedProcessor, errors_to_device
from distllm.runtime.sampling.sampled import Logprobs, Sampled
from distllm.runtime.sampling.token_masks import apply_masks
from distllm.runtime.slots import SlotTables
from distllm.runtime.staging import to_device

SCORED_ROWS = 128  # tokens of prompts whose logits exist at a time


class Sampler:
    """The last stage's. Every tensor-parallel rank calls it alike and gets the same tokens.

    Rows that are plain (RowSampling.is_plain, and no mask) are chosen where their logits lie, and only the
    best of each rank travel; the others need all logits on every rank.
    """

    def __init__(
        self, head: VocabParallelHead, tables: SlotTables, processors: Sequence[NamedProcessor] = ()
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
        masked = apply_masks(logits, slots, self._tables.token_masks)
        allowed, errors = self._control(masked, rows, history)
        token_ids = _choose(allowed, rows, positions, parameters)
        num_top = num_top_logprobs(rows)
        return Sampled(
            token_ids,
            logprobs=_logprobs(logits, token_ids, num_top) if num_top >= 0 else None,
            errors=errors_to_device(errors, logits.device) if errors else None,
        )

    def score(self, hidden: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> Logprobs:
        """Of tokens that are known: token_ids [n] int64 are those behind hidden [n, hidden_size]. A piece at
        a time, so that memory does not grow with the prompt.

        Collective: one all_gather a piece by every rank of tp.
        """
        pieces = [
            _logprobs(self._head.gather(self._head(part)), ids, num_top)
            for part, ids in zip(hidden.split(SCORED_ROWS), token_ids.split(SCORED_ROWS), strict=True)
        ]
        values, top_ids = zip(*((piece.values, piece.top_ids) for piece in pieces), strict=True)
        return Logprobs(torch.cat(values), torch.cat(top_ids))

    def rehearse(self, hidden: torch.Tensor) -> None:
        """Run the kernels of rows that are not plain, on any hidden states [4, hidden_size]: no request is to
        wait until they are compiled.

        Collective: every rank of tp.
        """
        logits, num_rows = self._head.gather(self._head(hidden)), len(hidden)
        zeros = torch.zeros(num_rows, dtype=torch.int64, device=hidden.device)
        p = self._tables.parameters(zeros)
        heat = p["temperature"]
        for each in (logits, logits.float()):  # behind controls they are fp32
            lowest = lowest_kept(each, heat, p["top_k"], p["top_p"], p["min_p"])
            for border in (None, lowest):
                keep_typical(each, heat, border, heat)
                sample_tokens(each, heat, p["seed"], zeros, border)
        history = History(self._tables.token_ids, zeros, zeros, zeros)
        penalized = ControlledRows([LogitControls(presence_penalty=1)], [], logits.device)
        penalized.apply(logits[:1], history)
        token_logprobs(logits, zeros, 1)
        apply_masks(logits, [0] * num_rows, {0: bytes(num_rows * mask_bytes(logits.shape[1]))})

    def sample_plain(self, shard: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As sample(), of plain rows: [n] int64. Decides nothing on the host, so it can be captured."""
        parameters = self._tables.parameters(slots)
        return self._head.best_tokens(shard, parameters["temperature"], parameters["seed"], positions)

    def _control(
        self, logits: torch.Tensor, rows: list[RowSampling], history: History
    ) -> tuple[torch.Tensor, list[str]]:
        controls = [row.controls for row in rows]
        if not any(controls):
            return logits, []
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
    """The input is kept."""
    if all(row.typical_p == 1 for row in rows):
        return logits
    masses = to_device([row.typical_p for row in rows], torch.float32, logits.device)
    return keep_typical(logits, temperature, lowest, masses)


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


def _logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> Logprobs:
    chosen, rank, top_ids, top_logprobs = token_logprobs(logits, token_ids, num_top)
    return Logprobs(torch.cat([chosen[:, None], rank[:, None].float(), top_logprobs], 1), top_ids)
