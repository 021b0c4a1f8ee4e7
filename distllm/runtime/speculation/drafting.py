"""Drafting: one request's speculation. What was guessed and is being verified, and how guesses fared so far.

A step that verifies runs the newest token and the drafts behind it, and samples after each. A result counts
as long as all drafts before it are the very tokens that were sampled there: since sampling draws its random
numbers from (seed, position), these are the tokens that would have come without drafts. Plain Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Drafting:
    limit: int  # drafts of the next verification at most
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
        """All results have come. Where every draft was right the next are more, else not many more than were
        right: text that can be guessed comes in stretches."""
        num_drafts = len(self.token_ids)
        self.num_drafted += num_drafts
        self.num_accepted += self.num_right
        self.limit = num_drafts + 2 if self.num_right == num_drafts else self.num_right + 1
        self.token_ids = ()
