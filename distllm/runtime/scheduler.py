"""Scheduler: who runs in the next step, with how many tokens, in which slot and blocks. Rank 0 only.

Plans ahead of results: a step is planned while `depth` earlier ones are still unread, so a request's newest
tokens may exist and be unknown (`num_pending`). Knows no tensor and no text. Rules: docs/scheduling.md.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter, deque
from dataclasses import dataclass
from operator import attrgetter

from distllm.runtime.block_tables import BlockTables
from distllm.runtime.plan import BlockUpdate, RowInit, ScheduledRow, StepPlan, StepResult, TokenLogprobs
from distllm.runtime.request import Request, RequestStatus
from distllm.runtime.scheduler_config import SchedulerConfig

__all__ = ["AcceptedToken", "Scheduler", "SchedulerConfig"]


BY_ORDER = attrgetter("order")


@dataclass(frozen=True)
class AcceptedToken:
    """One generated token, and how it ended its request, if it did."""

    request: Request
    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: str | None


class Scheduler:
    """Use: schedule() a step, run it, then update() with the result of the step `depth` before it."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._tables = BlockTables(config.num_blocks, config.block_size, config.enable_prefix_caching)
        self.step = 0  # the next to be planned
        self._num_arrivals = 0
        self._waiting: list[Request] = []  # by Request.order
        self._running: dict[int, Request] = {}  # by slot
        self._free_slots = list(range(config.max_num_seqs))  # a heap: low slots first keeps slot ranges whole
        self._outstanding: deque[tuple[int, list[Request]]] = deque()  # (step, who sampled, in batch order)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def has_outstanding(self) -> bool:
        """Whether tokens were sampled whose results have not been given back."""
        return any(sampled for _, sampled in self._outstanding)

    # requests come and go

    def add(self, request: Request) -> None:
        """Queue a request, after its leader (fork_from) if it has one. RequestError if it can never fit."""
        leader = request.fork_from
        assert not leader or leader.prompt_token_ids == request.prompt_token_ids, "a fork shares its prompt"
        self.config.check_fits(request)
        request.arrival, self._num_arrivals = self._num_arrivals, self._num_arrivals + 1
        insort(self._waiting, request, key=BY_ORDER)

    def abort(self, request: Request) -> None:
        """End a request, added or not, wherever it stands. One that has finished stays as it is."""
        if request.status is not RequestStatus.FINISHED:
            self.finish(request, "abort")

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """End a request; tokens on their way are dropped. One that has finished only takes the new reason."""
        request.finish_reason, request.stop_reason = reason, stop_reason
        if request.status is RequestStatus.RUNNING:
            self._vacate(request)
        elif request.status is not RequestStatus.FINISHED and request.arrival >= 0:
            del self._waiting[bisect_left(self._waiting, request.order, key=BY_ORDER)]
        request.status = RequestStatus.FINISHED

    # one step

    def schedule(self) -> StepPlan:
        """Plan the next step: decodes, then running prefills, then admissions. It may turn out empty."""
        plan = StepPlan(self.step)
        budget = self._schedule_decodes(plan, self.config.max_num_batched_tokens)
        budget = self._schedule_prefills(plan, budget)
        self._admit_waiting(plan, budget)
        plan.rows.sort(key=_batch_order)
        self._outstanding.append((plan.step, [self._running[slot] for slot in plan.sampled_slots]))
        self.step += 1
        return plan

    def _schedule_decodes(self, plan: StepPlan, budget: int) -> int:
        """One token each, at most a depth-th of all decodes: the stages' microbatches stay balanced."""
        decodes = [r for r in self._running.values() if r.num_uncomputed_tokens == 1 and r.wants_tokens]
        limit = min(budget, -(-len(decodes) // self.config.depth))
        ready = [request for request in decodes if request.ready_step <= self.step]
        for request in sorted(ready, key=lambda r: (r.ready_step, *r.order)):
            if limit == 0:
                break
            if request.status is RequestStatus.RUNNING and self._try_grow(plan, request):
                self._schedule_row(plan, request, 1)
                budget, limit = budget - 1, limit - 1
        return budget

    def _schedule_prefills(self, plan: StepPlan, budget: int) -> int:
        prefills = [request for request in self._running.values() if request.num_uncomputed_tokens > 1]
        for request in sorted(prefills, key=BY_ORDER):
            if budget == 0:
                break
            budget -= self._schedule_row(plan, request, budget)
        return budget

    def _admit_waiting(self, plan: StepPlan, budget: int) -> None:
        """In order; the first that finds no room stops those behind it, so that nobody waits forever."""
        position = 0
        while budget and self._free_slots and position < len(self._waiting):
            request = self._waiting[position]
            if self._awaits_leader(request, plan):
                position += 1
            elif self._try_admit(plan, request):
                del self._waiting[position]
                budget -= self._schedule_row(plan, request, budget)
            else:
                break

    def _schedule_row(self, plan: StepPlan, request: Request, budget: int) -> int:
        """Run the request's next tokens, as many as the budget lets; the last of them samples."""
        num_tokens = min(request.num_uncomputed_tokens, budget)
        request.num_computed_tokens += num_tokens
        samples = request.num_uncomputed_tokens == 0
        if samples:
            request.num_pending += 1
            request.ready_step = self.step + self.config.depth
        plan.rows.append(ScheduledRow(request.slot, num_tokens, samples))
        self._tables.register(request)
        return num_tokens

    # blocks and slots

    def _try_admit(self, plan: StepPlan, request: Request) -> bool:
        """Give the request a slot and all its blocks: its prefill never waits and never preempts."""
        if request.num_pending:  # preempted a moment ago: its tokens are not all known
            return False
        copies = self._tables.try_open(request)
        if copies is None:
            return False
        plan.block_copies += copies
        self._enter(plan, request)
        return True

    def _awaits_leader(self, request: Request, plan: StepPlan) -> bool:
        """Whether the prompt to be shared is not computed yet, or in this very step: too late for copies."""
        leader = request.fork_from
        if leader is None or leader.status not in (RequestStatus.WAITING, RequestStatus.RUNNING):
            return False
        in_this_step = sum(row.num_tokens for row in plan.rows if row.slot == leader.slot)
        return leader.num_computed_tokens - in_this_step < leader.num_prompt_tokens

    def _enter(self, plan: StepPlan, request: Request) -> None:
        num_computed = request.num_computed_tokens
        if request.status is RequestStatus.WAITING:
            request.num_cached_tokens = num_computed
        request.status = RequestStatus.RUNNING
        request.slot = slot = heapq.heappop(self._free_slots)
        self._running[slot] = request
        num_prompt, token_ids = request.num_prompt_tokens, tuple(request.token_ids)
        plan.new_rows.append(RowInit(slot, token_ids, num_prompt, num_computed, request.sampling))
        plan.block_updates.append(BlockUpdate(slot, 0, tuple(request.block_ids)))

    def _try_grow(self, plan: StepPlan, request: Request) -> bool:
        """See that the next token has a block, if need be a victim's."""
        if not self._tables.lacks_block(request):
            return True
        while not self._tables.try_append(request):
            victim = self._find_victim(plan, request)
            if victim is None:
                return False
            self._preempt(victim)
        start = len(request.block_ids) - 1
        plan.block_updates.append(BlockUpdate(request.slot, start, (request.block_ids[start],)))
        return True

    def _find_victim(self, plan: StepPlan, request: Request) -> Request | None:
        """The last in order of those behind the request that do not run in this step."""
        scheduled = {row.slot for row in plan.rows}
        behind = [r for r in self._running.values() if r.order > request.order and r.slot not in scheduled]
        return max(behind, key=BY_ORDER, default=None)

    def _preempt(self, request: Request) -> None:
        """Back to the queue. Generated tokens are kept; their KV will be computed again."""
        self._vacate(request)
        request.status = RequestStatus.PREEMPTED
        insort(self._waiting, request, key=BY_ORDER)

    def _vacate(self, request: Request) -> None:
        del self._running[request.slot]
        self._tables.close(request)
        self._release_slot(request)

    def _release_slot(self, request: Request) -> None:
        """Free the slot of a request that left, unless a sampled token has still to be written to its row."""
        if request.slot >= 0 and request.num_pending == 0:
            heapq.heappush(self._free_slots, request.slot)
            request.slot = -1

    # results

    def update(self, result: StepResult) -> list[AcceptedToken]:
        """Take the results of the steps in order; before step 0 they are empty. Tokens of requests that have
        finished meanwhile are dropped."""
        if result.step < 0:
            return []
        step, requests = self._outstanding.popleft()
        assert step == result.step, f"result of step {result.step} came, {step} is next"
        assert step + self.config.depth <= self.step, f"tokens of step {step} are not on the first stage yet"
        logprobs = result.logprobs or [None] * len(requests)
        entries = zip(requests, result.token_ids, logprobs, strict=True)
        return [accepted for entry in entries if (accepted := self._accept(*entry))]

    def _accept(self, request: Request, token_id: int, entry: TokenLogprobs | None) -> AcceptedToken | None:
        request.num_pending -= 1
        if request.status is RequestStatus.FINISHED:
            self._release_slot(request)
            return None
        request.token_ids.append(token_id)
        reason = self._end_reason(request, token_id)
        if request.status is RequestStatus.RUNNING:
            self._tables.register(request)
        else:
            self._release_slot(request)
        if reason:
            self.finish(request, reason)
        return AcceptedToken(request, token_id, entry, reason)

    @staticmethod
    def _end_reason(request: Request, token_id: int) -> str | None:
        if token_id in request.stop_token_ids:
            return "stop"
        return None if len(request.token_ids) < request.num_prompt_tokens + request.max_tokens else "length"

    def check_integrity(self) -> None:
        """Assert that blocks, slots and counts of pending tokens agree with the requests."""
        self._tables.check_integrity(self._running.values())
        pending = Counter(request for _, sampled in self._outstanding for request in sampled)
        known = [*self._running.values(), *self._waiting, *pending]
        assert all(request.num_pending == pending[request] for request in known), "pending tokens are lost"
        held = {request.slot for request in known} - {-1}
        slots = sorted([*held, *self._free_slots])
        assert slots == list(range(self.config.max_num_seqs)), f"a slot is lost or shared: {slots}"
        assert all(request.slot == slot for slot, request in self._running.items()), "a slot changed hands"


def _batch_order(row: ScheduledRow) -> tuple[bool, int]:
    """Decodes by slot, then the rest as they were scheduled (the sort is stable)."""
    is_decode = row.num_tokens == 1 and row.samples
    return not is_decode, row.slot if is_decode else 0
