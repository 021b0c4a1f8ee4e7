"""Constraint: what one sequence may say next, from a grammar and the tokens so far. Rank 0 only.

ConstraintThreads take new tokens beside the engine's own thread, so that a slow grammar holds up the requests
that have one and nobody else. Knows no scheduler; runtime.structured.grammars makes constraints.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from distllm.runtime.structured.grammar_trial import one_line

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from distllm.runtime.request import Request

NUM_THREADS = max(2, min(16, len(os.sched_getaffinity(0)) * 3 // 4))
JOB_S = 0.001  # of work that a thread is given at least: most masks take less than handing them over
SLOW_S = 0.003  # to take a token and find the next mask: the others of the batch do not wait so long


_Tokens = tuple["Request", list[int]]  # sampled, not yet taken


class Constraint:
    """mask: which token may come after the last one taken: one bit for each id, the lowest first, in whole
    int32 words. error: why no token can be found, if so; the mask means nothing then.
    """

    def __init__(
        self, matcher: LLMatcher, lineage: int = 0, min_tokens: int = 0, stop_token_ids: Sequence[int] = ()
    ) -> None:
        """matcher: this sequence's own, from here on. lineage: copies of one matcher share a lock; those of
        other numbers do not. min_tokens: until then no stop token is allowed where the grammar leaves
        anything else.
        """
        self.lineage = lineage
        self._matcher = matcher
        self._min_tokens, self._stops = min_tokens, frozenset(stop_token_ids)
        self._num_tokens = 0
        self.error: str | None = None
        self.cost_s = 0.0  # of the last tokens and the mask behind them
        self.mask = b""
        self._find_mask()

    @property
    def is_slow(self) -> bool:
        return self.cost_s > SLOW_S

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take tokens that were sampled, the first of them under the mask."""
        start = time.thread_time()  # waiting for Python's lock is not the grammar's fault
        self._take(token_ids)
        self.cost_s = time.thread_time() - start

    def _take(self, token_ids: Sequence[int]) -> None:
        self._num_tokens += len(token_ids)
        if not _allows(self.mask, token_ids[0]):
            self.error = "no token satisfies both the grammar and the other controls of the request"
        elif self._matcher.consume_tokens(list(token_ids)):
            self._find_mask()
        else:
            self._fail()

    def look_ahead(self, drafts: Sequence[int]) -> tuple[tuple[int, ...], bytes]:
        """Of tokens that may come next, those that the grammar lets come, and a mask for each place: the
        first draft's, …, and that behind the last. Nothing is taken.
        """
        masks, num_taken = [self.mask], 0
        for token_id in drafts:
            if (
                token_id in self._stops
                or not _allows(masks[-1], token_id)
                or not self._matcher.consume_token(token_id)
            ):
                break
            num_taken += 1
            masks.append(self._mask_after(num_taken))
        if num_taken:
            self._matcher.rollback(num_taken)
        return tuple(drafts[:num_taken]), b"".join(masks)

    def _find_mask(self) -> None:
        self.mask = self._mask_after(0)
        if self._matcher.is_error():
            self._fail()

    def _mask_after(self, num_ahead: int) -> bytes:
        """num_ahead: tokens that the matcher knows beyond those that were taken."""
        mask = self._matcher.compute_bitmask()
        return self._without_stops(mask) if self._num_tokens + num_ahead < self._min_tokens else mask

    def _without_stops(self, mask: bytes) -> bytes:
        """Unless nothing else is left. By bytes: arithmetic on all bits at once would hold Python's lock."""
        others = bytearray(mask)
        for token_id in self._stops:
            others[token_id // 8] &= ~(1 << token_id % 8)
        return bytes(others) if others.count(0) < len(others) else mask

    def _fail(self) -> None:
        self.error = f"the grammar cannot go on: {one_line(self._matcher.get_error())}"


class ConstraintThreads:
    """Advance the constraints of requests. Finding a mask does not hold Python's lock, taking a token does:
    threads help where masks are costly, and hold each other up where they are not.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(NUM_THREADS, "constraints")  # starts threads as they are needed
        self._jobs: dict[Future[None], list[Request]] = {}

    def advance(self, tokens: Sequence[_Tokens]) -> None:
        """Let each request's constraint take its newest tokens. Returns at once."""
        for job in _jobs(tokens):
            self._jobs[self._executor.submit(_advance, job)] = [request for request, _ in job]

    def collect(self, timeout_s: float | None) -> list[Request]:
        """The requests whose constraints came up to date since the last call. Waits no longer for one; None:
        as long as it takes."""
        if not self._jobs:
            return []
        done, _ = wait(self._jobs, timeout_s, FIRST_COMPLETED)
        ready = [job for job in self._jobs if job in done]
        for job in ready:
            job.result()  # raises what went wrong there
        return [request for job in ready for request in self._jobs.pop(job)]


def _jobs(tokens: Sequence[_Tokens]) -> Iterator[list[_Tokens]]:
    """The quick ones in as many jobs as the last time has shown to be worth while, what shares a lock in one
    of them; each slow one by itself."""
    quick = [each for each in tokens if not _constraint(each).is_slow]
    cost_s = sum(_constraint(each).cost_s for each in quick)
    parts: list[list[_Tokens]] = [[] for _ in range(max(1, min(NUM_THREADS, int(cost_s / JOB_S))))]
    for each in quick:
        parts[_constraint(each).lineage % len(parts)].append(each)
    yield from filter(None, parts)
    yield from ([each] for each in tokens if _constraint(each).is_slow)


def _advance(tokens: Sequence[_Tokens]) -> None:
    for each in tokens:
        _constraint(each).advance(each[1])


def _constraint(tokens: _Tokens) -> Constraint:
    constraint = tokens[0].constraint
    assert constraint is not None, "only requests with a constraint are handed over"
    return constraint


def _allows(mask: bytes, token_id: int) -> bool:
    return bool(mask[token_id // 8] >> token_id % 8 & 1)
