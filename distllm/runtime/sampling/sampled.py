"""What a step yields, on its way from the last stage's device to rank 0: tokens and log-probabilities.

Its shapes are functions of the plan (SampledRows), so that every rank knows what travels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch

from distllm.runtime.plan import TokenLogprobs
from distllm.runtime.sampling.logits_processors import ERROR_BYTES


@dataclass(frozen=True)
class SampledRows:
    """Who sampled in a step, where the new tokens belong, and what was asked for beside them."""

    step: int
    slots: list[int]
    positions: torch.Tensor  # [n] int64
    num_top: int  # log-probabilities asked for, −1 for none
    num_scored: int = 0  # tokens of prompts
    num_prompt_top: int = -1  # as num_top, of these
    processed: tuple[int, ...] = ()  # those of the tokens that a user's processors may fail at


@dataclass(frozen=True)
class Logprobs:
    values: torch.Tensor  # [n, 2 + num_top] fp32: the token's, its rank, the best ones'
    top_ids: torch.Tensor  # [n, num_top] int64

    @staticmethod
    def empty(num_rows: int, num_top: int, device: torch.device) -> Logprobs:
        values = torch.empty(num_rows, 2 + num_top, dtype=torch.float32, device=device)
        return Logprobs(values, torch.empty(num_rows, num_top, dtype=torch.int64, device=device))

    def tolist(self) -> list[TokenLogprobs]:
        rows = zip(self.values.tolist(), self.top_ids.tolist(), strict=True)
        return [TokenLogprobs(v[0], int(v[1]), tuple(ids), tuple(v[2:])) for v, ids in rows]


@dataclass(frozen=True)
class Sampled:
    """The tokens of plan.sampled_slots and the scores of plan.scored_rows, in these orders."""

    token_ids: torch.Tensor  # [n] int64
    logprobs: Logprobs | None = None
    scores: Logprobs | None = None
    errors: torch.Tensor | None = None  # of rows.processed, as errors_to_device makes them

    @staticmethod
    def empty(rows: SampledRows, device: torch.device) -> Sampled:
        """Room to receive what rows yield."""
        token_ids = torch.empty(len(rows.slots), dtype=torch.int64, device=device)
        logprobs = Logprobs.empty(len(rows.slots), rows.num_top, device) if rows.num_top >= 0 else None
        scores = Logprobs.empty(rows.num_scored, rows.num_prompt_top, device) if rows.num_scored else None
        size = len(rows.processed), ERROR_BYTES
        errors = torch.empty(size, dtype=torch.uint8, device=device) if rows.processed else None
        return Sampled(token_ids, logprobs, scores, errors)

    @staticmethod
    def of_parts(rows: SampledRows, parts: list[torch.Tensor]) -> Sampled:
        """Inverse of parts."""
        token_ids, *rest = parts
        errors = rest.pop() if rows.processed else None
        pairs = iter([Logprobs(*pair) for pair in zip(rest[::2], rest[1::2], strict=True)])
        logprobs = next(pairs) if rows.num_top >= 0 else None
        return Sampled(token_ids, logprobs, next(pairs, None), errors)

    @property
    def parts(self) -> list[torch.Tensor]:
        """token_ids, values and top_ids of what was asked for, errors."""
        errors = [] if self.errors is None else [self.errors]
        return [self.token_ids, *chain.from_iterable(self._pairs()), *errors]

    @property
    def messages(self) -> list[torch.Tensor]:
        """What travels from the last stage to the first, in order. Empty tensors do not travel."""
        return [part for part in self.parts if part.numel()]

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((each.values, each.top_ids) for each in (self.logprobs, self.scores) if each is not None)
