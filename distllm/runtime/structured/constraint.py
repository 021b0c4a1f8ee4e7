"""Constraint: what one sequence may say next, from a grammar and the tokens so far. Rank 0 only.

Most masks are found sooner than handed over: those are found together, on the spot. Costly ones are found by
ConstraintThreads beside the engine's own thread, so that a slow grammar holds up the requests that have one
and nobody else. Knows no scheduler; runtime.structured.grammars makes constraints.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from distllm.runtime.plan import mask_bytes
from distllm.runtime.structured.grammar_trial import one_line

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

    from distllm.runtime.request import Request

NUM_THREADS = max(2, min(16, len(os.sched_getaffinity(0)) * 3 // 4))
# To take a token and find the next mask: up to here it is done together with others, and up to here the
# others of the batch wait for it.
LIGHT_S, SLOW_S = 0.0003, 0.003

_Tokens = tuple["Request", list[int]]  # sampled, not yet taken


class Constraint:
    """mask: which token may come after the last one taken: one bit for each id, the lowest first, in whole
    int32 words. error: why no token can be found, if so; the mask means nothing then.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocab_size: int,
        lineage: int = 0,
        min_tokens: int = 0,
        stop_token_ids: Sequence[int] = (),
    ) -> None:
        """matcher: this sequence's own, from here on. lineage: copies of one matcher share a lock; those of
        other numbers do not. min_tokens: until then no stop token is allowed where the grammar leaves
        anything else.
        """
        self._num_bytes = mask_bytes(vocab_size)
        self.lineage = lineage
        self._matcher = matcher
        self._min_tokens, self._stops = min_tokens, frozenset(stop_token_ids)
        self._num_tokens = 0
        self.error: str | None = None
        self.cost_s = 0.0  # of the last tokens and the mask behind them
        self.mask = b""
        self._find_mask()

    @property
    def is_light(self) -> bool:
        return self.cost_s <= LIGHT_S

    @property
    def is_slow(self) -> bool:
        return self.cost_s > SLOW_S

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take tokens that were sampled, the first of them under the mask."""
        start = time.thread_time()  # waiting for Python's lock is not the grammar's fault
        if self._take(token_ids):
            self._find_mask()
        self.cost_s = time.thread_time() - start

    @staticmethod
    def advance_together(tokens: Iterable[tuple[Constraint, Sequence[int]]], executor: LLExecutor) -> None:
        """As advance() of each, if all are light. Where they turn out not to be, they no longer count as
        such: who is to blame will be seen when each is timed by itself."""
        start = time.perf_counter()
        taken = [constraint for constraint, token_ids in tokens if constraint._take(token_ids)]
        if not taken:
            return
        masks = np.empty((len(taken), taken[0]._num_bytes), dtype=np.uint8)
        places = [(constraint._matcher, number) for number, constraint in enumerate(taken)]
        executor.unsafe_compute_mask_ptr(places, masks.ctypes.data, masks.strides[0], len(masks))
        for constraint, mask in zip(taken, masks, strict=True):
            constraint._put(mask.tobytes())
        if time.perf_counter() - start > SLOW_S + len(taken) * LIGHT_S / NUM_THREADS:
            for constraint in taken:
                constraint.cost_s = SLOW_S

    def _take(self, token_ids: Sequence[int]) -> bool:
        """Whether there is a mask to be found."""
        self._num_tokens += len(token_ids)
        if not _allows(self.mask, token_ids[0]):
            self.error = "no token satisfies both the grammar and the other controls of the request"
        elif not self._matcher.consume_tokens(list(token_ids)):
            self._fail()
        return self.error is None

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
            masks.append(self._checked(self._bitmask(), num_taken))
        if num_taken:
            self._matcher.rollback(num_taken)
        return tuple(drafts[:num_taken]), b"".join(masks)

    def _find_mask(self) -> None:
        self._put(self._bitmask())

    def _bitmask(self) -> bytes:
        return self._matcher.compute_bitmask()[: self._num_bytes]  # the library's may have a word more

    def _put(self, mask: bytes) -> None:
        self.mask = self._checked(mask, 0)
        if self._matcher.is_error():
            self._fail()

    def _checked(self, mask: bytes, num_ahead: int) -> bytes:
        """num_ahead: tokens that the matcher knows beyond those that were taken."""
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
        self._threads = ThreadPoolExecutor(NUM_THREADS, "constraints")  # starts threads as they are needed
        self._jobs: dict[Future[None], list[Request]] = {}
        self._ready: list[Request] = []

    def advance(self, tokens: Sequence[_Tokens]) -> None:
        """Let each request's constraint take its newest tokens. Returns as soon as the light ones have."""
        light = [each for each in tokens if _constraint(each).is_light]
        costly = [each for each in tokens if not _constraint(each).is_light]
        for job in _jobs(costly):
            self._jobs[self._threads.submit(_advance, job)] = [request for request, _ in job]
        if light:
            Constraint.advance_together(((_constraint(each), each[1]) for each in light), self._light_threads)
            self._ready += [request for request, _ in light]

    def collect(self, timeout_s: float | None) -> list[Request]:
        """The requests whose constraints came up to date since the last call. Waits no longer for one; None:
        as long as it takes."""
        ready, self._ready = self._ready, []
        if self._jobs:
            done, _ = wait(self._jobs, 0 if ready else timeout_s, FIRST_COMPLETED)
            for job in [job for job in self._jobs if job in done]:
                job.result()  # raises what went wrong there
                ready += self._jobs.pop(job)
        return ready

    @cached_property
    def _light_threads(self) -> LLExecutor:
        """The library's own, which never hold Python's lock."""
        from llguidance import LLExecutor

        return LLExecutor(NUM_THREADS)


def _jobs(tokens: Sequence[_Tokens]) -> list[list[_Tokens]]:
    """What shares a lock is one job; each slow one is a job by itself."""
    parts: list[list[_Tokens]] = [[] for _ in range(NUM_THREADS)]
    for each in tokens:
        if not _constraint(each).is_slow:
            parts[_constraint(each).lineage % NUM_THREADS].append(each)
    slow = [[each] for each in tokens if _constraint(each).is_slow]
    return [part for part in parts if part] + slow


def _advance(tokens: Sequence[_Tokens]) -> None:
    for each in tokens:
        _constraint(each).advance(each[1])


def _constraint(tokens: _Tokens) -> Constraint:
    constraint = tokens[0].constraint
    assert constraint is not None, "only requests with a constraint are handed over"
    return constraint


def _allows(mask: bytes, token_id: int) -> bool:
    return bool(mask[token_id // 8] >> token_id % 8 & 1)
