"""Drafting: one request's speculation. What was guessed and is being verified, and how guesses fared so far.

A step that verifies runs the newest token and the drafts behind it, and samples after each. A result counts
as long as all drafts before it are the very tokens that were sampled there: since sampling draws its random
numbers from (seed, position), these are the tokens that would have come without drafts. Plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

LEAST_CHANCE = 0.25  # of a draft to be right, with all before it: below, its place is better left empty
MEMORY = 0.7  # of acceptance: what is left of it after each verification


@dataclass(slots=True)
class Drafting:
    limit: int  # drafts of the next verification at most
    acceptance: float = 0.8  # chance of a draft whose predecessors are right, as it has been of late
    token_ids: tuple[int, ...] = ()  # in verification
    start: int = 0  # their first position
    num_right: int = 0  # of those in verification, as far as results have come
    num_drafted: int = 0  # in all
    num_accepted: int = 0

    def begin(self, start: int, token_ids: tuple[int, ...]) -> None:
        self.start, self.token_ids, self.num_right = start, token_ids, 0

    def takes(self, number: int, known: Sequence[int]) -> bool:
        """Whether result `number` (0, 1, …) of the verification counts, the ones before it being in known."""
        right = self.token_ids[:number]
        if len(known) != self.start + number or tuple(known[self.start :]) != right:
            return False
        self.num_right = number
        return True

    def end(self) -> None:
        """All results have come."""
        num_drafts = len(self.token_ids)
        self.num_drafted += num_drafts
        self.num_accepted += self.num_right
        num_tried = min(self.num_right + 1, num_drafts)
        self.acceptance = MEMORY * self.acceptance + (1 - MEMORY) * self.num_right / num_tried
        self.limit = max(1, int(log(LEAST_CHANCE) / log(min(max(self.acceptance, 0.01), 0.99))))
        if self.num_right == num_drafts:  # text that can be guessed comes in stretches
            self.limit = max(self.limit, num_drafts + 2)
        self.token_ids = ()
