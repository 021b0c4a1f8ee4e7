"""The user's own proposer: a function from the tokens so far to a guess of the next ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from distllm.errors import DistllmError
from distllm.runtime.request import Request

Propose = Callable[[list[int], int], Sequence[int]]
"""(prompt and output so far, how many are wanted) → token ids, at most as many. Called on rank 0 alone."""


class CustomProposer:
    def __init__(self, propose: Propose, vocab_size: int) -> None:
        self._propose = propose
        self._vocab_size = vocab_size

    def propose(self, wanted: Mapping[Request, int]) -> list[list[int]]:
        """Raises DistllmError for what is no token."""
        return [self._guess(request, count) for request, count in wanted.items()]

    def _guess(self, request: Request, count: int) -> list[int]:
        drafts = [int(token_id) for token_id in self._propose(list(request.token_ids), count)][:count]
        for token_id in drafts:
            if not 0 <= token_id < self._vocab_size:
                raise DistllmError(
                    f"the proposer guessed token id {token_id}; the vocabulary is 0 … {self._vocab_size - 1}"
                )
        return drafts
