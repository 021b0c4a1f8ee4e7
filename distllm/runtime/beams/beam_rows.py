"""BeamRows: all rows of one beam search, as requests that the scheduler admits, moves and preempts together.

Every row samples once, then waits until the results of all have come and the search has decided what each row
holds next. Knows no block, no slot and no score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from distllm.runtime.beams.group_search import Child
from distllm.runtime.plan import TokenLogprobs
from distllm.runtime.request import Request, RequestStatus


class Search(Protocol):
    def advance(self, results: Sequence[TokenLogprobs]) -> list[Child] | None:
        """As BeamSearch.advance."""
        ...


class BeamRows:
    """requests: beam_width of them, with the same prompt. While `is_fresh` only the first runs, the others
    hold a slot and nothing more."""

    def __init__(self, requests: list[Request], search: Search) -> None:
        self.requests = requests
        self.is_fresh = True
        self.children: list[Child] | None = None  # decided, not yet carried out
        self._search = search
        self._results: dict[Request, TokenLogprobs] = {}
        for request in requests:
            request.group = self
            request.max_total_tokens = request.num_prompt_tokens + 1  # nothing runs ahead of a decision

    @property
    def live(self) -> list[Request]:
        """The rows that hold a beam."""
        return self.requests[:1] if self.is_fresh else self.requests

    @property
    def parents(self) -> list[int]:
        """Of each row, the row that it continues. There must be a decision."""
        assert self.children is not None, "nothing is decided"
        return [child.parent for child in self.children]

    def restart(self) -> None:
        """All rows are computed again: results that have come will come again."""
        self._results.clear()

    def take(self, request: Request, result: TokenLogprobs | None) -> bool:
        """Keep a row's result. With the last of them the search decides: then True, and `children` holds what
        comes next, or None at the end of the search."""
        assert result is not None, "beams ask for log-probabilities"
        self._results[request] = result
        if len(self._results) < len(self.live):
            return False
        self.children = self._search.advance([self._results[row] for row in self.live])
        self._results.clear()
        return True

    def take_over(self) -> list[int]:
        """Give every row its new tokens; return, of each, from which position on they changed."""
        assert self.children is not None, "nothing is decided"
        tokens = [row.token_ids for row in self.live]
        digests = [row.block_digests for row in self.live]
        starts = []
        for number, (row, child) in enumerate(zip(self.requests, self.children, strict=True)):
            known = tokens[number] if number < len(tokens) else []
            row.token_ids = [*tokens[child.parent], child.token_id]
            row.block_digests = digests[child.parent].copy()
            row.max_total_tokens = len(row.token_ids) + 1
            prompt = len(known) and row.num_prompt_tokens  # alike in all rows
            starts.append(prompt + common_length(known[prompt:], row.token_ids[prompt:]))
        self.is_fresh, self.children = False, None
        return starts

    def check_integrity(self) -> None:
        """Assert that running rows stand where the search believes them."""
        assert len({row.status for row in self.requests}) == 1, "beams came apart"
        if self.requests[0].status is RequestStatus.RUNNING:
            waiting = self.live if self.children else list(self._results)
            assert not any(row.num_uncomputed_tokens for row in waiting), "a result of a row that runs again"


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading entries are the same."""
    different = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(different, min(len(first), len(second)))
