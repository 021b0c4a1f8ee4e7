"""Where drafts come from, as the scheduler sees it. Rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from distllm.runtime.request import Request


class Proposer(Protocol):
    def propose(self, wanted: Mapping[Request, int]) -> list[list[int]]:
        """Guess how each request goes on: at most so many tokens, or fewer, or none; in the order of wanted.

        All tokens of these requests are known, and their blocks have room for those that are wanted.
        """
        ...
