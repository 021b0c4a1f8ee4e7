"""Constraint: what one sequence may say next, from a grammar and the tokens so far. Rank 0 only.

ConstraintThreads take new tokens beside the engine's own thread, so that a slow grammar holds up the requests
that have one and nobody else. Knows no scheduler; runtime.structured.grammars makes constraints.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from distllm.runtime.structured.grammar_trial import one_line

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from distllm.runtime.request import Request

NUM_THREADS = 4
ROWS_OF_A_JOB = 16  # at least: most masks take less than handing them over


class Constraint:
    """mask: which token may come after the last one taken: one bit for each id, the lowest first, in whole
    int32 words. error: why no token can be found, if so; the mask means nothing then.
    """

    def __init__(self, matcher: LLMatcher, min_tokens: int = 0, stop_token_ids: Sequence[int] = ()) -> None:
        """matcher: this sequence's own, from here on. min_tokens: until then no stop token is allowed where
        the grammar leaves anything else.
        """
        self._matcher = matcher
        self._min_tokens, self._stops = min_tokens, sum(1 << token_id for token_id in set(stop_token_ids))
        self._num_tokens = 0
        self.error: str | None = None
        self.mask = b""
        self._find_mask()

    def advance(self, token_id: int) -> None:
        """Take the token that was sampled under the mask."""
        self._num_tokens += 1
        if not self.mask[token_id // 8] >> token_id % 8 & 1:
            self.error = "no token satisfies both the grammar and the other controls of the request"
        elif self._matcher.consume_token(token_id):
            self._find_mask()
        else:
            self._fail()

    def _find_mask(self) -> None:
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self._fail()
        self.mask = self._without_stops(mask) if self._num_tokens < self._min_tokens else mask

    def _without_stops(self, mask: bytes) -> bytes:
        others = int.from_bytes(mask, "little") & ~self._stops
        return others.to_bytes(len(mask), "little") if others else mask

    def _fail(self) -> None:
        self.error = f"the grammar cannot go on: {one_line(self._matcher.get_error())}"


class ConstraintThreads:
    """Advance the constraints of requests. Finding a mask does not hold Python's lock: threads share that;
    taking a token does.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(NUM_THREADS, "constraints")  # starts threads as they are needed
        self._jobs: dict[Future[None], list[Request]] = {}

    def advance(self, tokens: list[tuple[Request, int]]) -> None:
        """Let each request's constraint take its newest token. Returns at once."""
        size = max(ROWS_OF_A_JOB, -(-len(tokens) // NUM_THREADS))
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            self._jobs[self._executor.submit(_advance, part)] = [request for request, _ in part]

    def collect(self, timeout_s: float) -> list[Request]:
        """The requests whose constraints came up to date since the last call. Waits no longer for all."""
        if not self._jobs:
            return []
        done, _ = wait(self._jobs, timeout_s)
        ready = [job for job in self._jobs if job in done]
        for job in ready:
            job.result()  # raises what went wrong there
        return [request for job in ready for request in self._jobs.pop(job)]


def _advance(tokens: list[tuple[Request, int]]) -> None:
    for request, token_id in tokens:
        assert request.constraint is not None, "only requests with a constraint are handed over"
        request.constraint.advance(token_id)
