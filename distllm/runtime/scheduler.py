"""Scheduler: who runs in the next step, with how many tokens, in which slot and blocks. Rank 0 only.

Plans ahead of results: a step is planned while `depth` earlier ones are still unread, so a request's newest
tokens may exist and be unknown (`num_pending`). Knows no tensor and no text. Rules: docs/scheduling.md.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import islice

from distllm.runtime.beams.beam_rows import BeamRows
from distllm.runtime.beams.branching import Branching
from distllm.runtime.block_tables import BlockTables
from distllm.runtime.plan import (
    BlockUpdate,
    PrefillRow,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from distllm.runtime.request import NEVER, Request, RequestStatus
from distllm.runtime.running import BY_ORDER, BY_SLOT, Running
from distllm.runtime.scheduler_config import SchedulerConfig
from distllm.runtime.speculation.speculation import Speculation
from distllm.runtime.speculation.verification import Verification

__all__ = ["AcceptedToken", "Scheduler", "SchedulerConfig", "ScoredPrompt"]


# A plain tuple: hundreds are made in a step. Without a token: the request has ended by an error instead.
AcceptedToken = tuple[Request, int | None, TokenLogprobs | None]
ScoredPrompt = tuple[Request, int, list[TokenLogprobs]]  # of its tokens from this position on


@dataclass(frozen=True)
class _Outstanding:
    """Of a planned step whose results have not come: whose each sampled token is, and whose prompts are
    scored from where on and how far, in batch order.
    """

    step: int
    sampled: list[Request]
    scored: list[tuple[Request, int, int]]


class Scheduler:
    """Use: schedule() a step, run it, then update() with the result of the step `depth` before it."""

    def __init__(self, config: SchedulerConfig, speculation: Speculation | None = None) -> None:
        self.config = config
        self._tables = BlockTables(config.num_blocks, config.block_size, config.enable_prefix_caching)
        self.step = 0  # the next to be planned
        self._num_arrivals = 0
        self._waiting: list[Request] = []  # by Request.order
        self._running = Running(config.max_num_seqs)
        self._branching = Branching(self._tables, self._running)
        self._verification = Verification(speculation, self._tables) if speculation else None
        self._outstanding: deque[_Outstanding] = deque()
        self._scored: list[tuple[Request, int, int]] = []  # of the step that is being planned
        self.awaiting: list[Request] = []  # whose masks the last plan awaits

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running.by_slot)

    @property
    def has_outstanding(self) -> bool:
        """Whether tokens were sampled or scored whose results have not been given back."""
        return any(entry.sampled or entry.scored for entry in self._outstanding)

    # requests come and go

    def add(self, request: Request) -> None:
        """Queue a request, after its leader (fork_from) if it has one. RequestError if it can never fit."""
        leader = request.fork_from
        assert not leader or leader.prompt_token_ids == request.prompt_token_ids, "a fork shares its prompt"
        self.config.check_fits(request)
        request.arrival, self._num_arrivals = self._num_arrivals, self._num_arrivals + 1
        insort(self._waiting, request, key=BY_ORDER)

    def abort(self, request: Request) -> None:
        """End a request, added or not, wherever it stands, with those that it is together with. One that has
        finished stays as it is."""
        if request.group is not None:
            self._branching.forget(request.group)
        for row in request.together:
            if row.status is not RequestStatus.FINISHED:
                self.finish(row, "abort")

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
        plan, self._scored = StepPlan(self.step), []
        branched = self._branching.carry_out(plan, self._try_make_room)
        budget = self._schedule_decodes(plan, self.config.max_num_batched_tokens, branched)
        num_verified = len(plan.prefills)
        budget = self._schedule_prefills(plan, budget)
        self._admit_waiting(plan, budget)
        if self._verification is not None and len(plan.prefills) > num_verified:
            self._verification.speculation.switch.disturb()
        sampled = [self._running.by_slot[slot] for slot in plan.sampled_slots]
        self._constrain(plan, sampled)
        self._outstanding.append(_Outstanding(plan.step, sampled, self._scored))
        self.step += 1
        return plan

    def resume(self, request: Request) -> None:
        """The request's constraint has taken all its tokens: its mask is that of the next one."""
        request.num_tokens_in_mask = request.num_output_tokens
        if request.ready_step == NEVER and not request.num_pending:
            request.ready_step = self.step

    def _constrain(self, plan: StepPlan, sampled: list[Request]) -> None:
        """What may come after a token depends on it. Masks that are not known yet are awaited while the step
        runs; where finding one takes long, the request does not run before it is found."""
        self.awaiting = []
        for request in sampled:
            if request.constraint is None:
                continue
            if request.constraint.is_slow:
                request.ready_step = NEVER
            if request.slot in plan.token_masks:
                continue
            if request.num_tokens_in_mask == request.num_planned_tokens - 1 - request.num_prompt_tokens:
                plan.token_masks[request.slot] = request.constraint.mask
            else:
                self.awaiting.append(request)
        plan.awaits_masks = bool(self.awaiting)

    def _schedule_decodes(self, plan: StepPlan, budget: int, branched: set[Request]) -> int:
        """One token each, or drafts besides; at most a depth-th of all decodes: the stages' microbatches stay
        balanced."""
        decodes = self._running.decodes
        limit = min(budget, -(-len(decodes) // self.config.depth))
        ready = [request for request in decodes if request.ready_step <= self.step]
        if self._verification is not None:
            ready = self._verification.speculation.choose(ready, len(decodes))
        growing = [request for request in ready if request.num_computed_tokens == request.capacity]
        if len(ready) > limit or not self._tables.has_room(len(growing)):
            ready = self._choose_decodes(plan, ready, limit, branched)
        else:  # everybody runs, as nearly always: no need to ask who goes first
            plan.block_updates += map(self._tables.append, growing)
        budget -= len(ready)
        if self._verification is not None:
            ready, budget = self._verification.schedule(plan, ready, budget)
        self._advance_decodes(plan, ready)
        return budget

    def _choose_decodes(
        self, plan: StepPlan, ready: list[Request], limit: int, branched: set[Request]
    ) -> list[Request]:
        """Those that were ready first, then in order, as far as limit and blocks reach; by slot."""
        chosen: list[Request] = []
        spared = branched.copy()
        for request in sorted(ready, key=lambda r: (r.ready_step, *r.order)):
            if len(chosen) == limit:
                break
            if request.status is RequestStatus.RUNNING and self._try_grow(plan, request, spared):
                chosen.append(request)
                spared.add(request)
        return sorted(chosen, key=BY_SLOT)

    def _advance_decodes(self, plan: StepPlan, requests: list[Request]) -> None:
        """Run one token of each, by slot; the few that end by length with the one they sample leave."""
        ready_step = self.step + self.config.depth
        for request in requests:
            request.num_computed_tokens += 1
            request.num_pending += 1
            request.ready_step = ready_step
        plan.decode_slots += [request.slot for request in requests]
        for request in [r for r in requests if r.num_computed_tokens + 1 == r.max_total_tokens]:
            self._running.decodes.remove(request)

    def _schedule_prefills(self, plan: StepPlan, budget: int) -> int:
        for request in list(self._running.prefills):
            if budget == 0:
                break
            budget -= self._schedule_row(plan, request, budget)
        return budget

    def _admit_waiting(self, plan: StepPlan, budget: int) -> None:
        """In order; the first that finds no room stops those behind it, so that nobody waits forever."""
        position = 0
        while budget and self._running.free_slots and position < len(self._waiting):
            request = self._waiting[position]
            if self._awaits_leader(request, plan):
                position += 1
                continue
            rows = self._try_admit(plan, request)
            if not rows:
                break
            del self._waiting[position : position + len(request.together)]
            for row in rows:
                budget -= self._start(plan, row, budget)

    def _start(self, plan: StepPlan, request: Request, budget: int) -> int:
        """Run the first tokens of a request that was admitted; of its beams the last may find no budget."""
        if budget:
            return self._schedule_row(plan, request, budget)
        if request.num_uncomputed_tokens == 1:
            self._running.end_prefill(request)
        return 0

    def _schedule_row(self, plan: StepPlan, request: Request, budget: int) -> int:
        """Run the request's next tokens, as many as the budget lets; the last of them samples."""
        num_tokens = min(request.num_uncomputed_tokens, budget)
        start = request.num_computed_tokens
        request.num_computed_tokens += num_tokens
        samples = request.num_uncomputed_tokens == 0
        if samples:
            request.num_pending += 1
            request.ready_step = self.step + self.config.depth
        if samples and num_tokens == 1:
            insort(plan.decode_slots, request.slot)
        else:
            num_scored = request.num_scored(start, num_tokens)
            plan.prefills.append(PrefillRow(request.slot, num_tokens, samples, num_scored))
            if num_scored:
                self._scored.append((request, start + 1, num_scored))
        if request.num_uncomputed_tokens == 1:
            self._running.end_prefill(request)
        self._tables.register(request)
        return num_tokens

    # blocks and slots

    def _try_admit(self, plan: StepPlan, request: Request) -> Sequence[Request]:
        """Give the request a slot and all its blocks: its prefill never waits and never preempts. Of a beam
        search all rows get theirs, or none. Returns those that have something to compute."""
        rows = request.together
        # Preempted a moment ago: its tokens are not all known, or not what may come after them.
        if any(row.num_pending or row.ready_step > self.step for row in rows):
            return ()
        live = rows if request.group is None else request.group.live
        copies = self._tables.try_open_all(live) if len(rows) <= len(self._running.free_slots) else None
        if copies is None:
            return ()
        plan.block_copies += copies
        for row in live:
            self._enter(plan, row)
        if request.group is not None:
            request.group.restart()
            self._hold_slots(rows[len(live) :])
        return live

    def _hold_slots(self, rows: Sequence[Request]) -> None:
        """Of rows that will take over what another has computed."""
        for row in rows:
            row.status, row.num_computed_tokens = RequestStatus.RUNNING, row.num_prompt_tokens
            self._running.hold(row)

    def _awaits_leader(self, request: Request, plan: StepPlan) -> bool:
        """Whether the prompt to be shared is not computed yet, or in this very step: too late for copies. A
        leader that enters now may have found blocks that another request computes now."""
        leader = request.fork_from
        if leader is None or leader.status not in (RequestStatus.WAITING, RequestStatus.RUNNING):
            return False
        if any(row.slot == leader.slot for row in plan.new_rows):
            return True
        in_this_step = sum(row.num_tokens for row in plan.prefills if row.slot == leader.slot)
        in_this_step += leader.slot in plan.decode_slots
        return leader.num_computed_tokens - in_this_step < leader.num_prompt_tokens

    def _enter(self, plan: StepPlan, request: Request) -> None:
        if request.status is RequestStatus.WAITING:
            request.num_cached_tokens = request.num_computed_tokens
        request.status = RequestStatus.RUNNING
        slot = self._running.enter(request)
        plan.new_rows.append(request.row_init)
        plan.block_updates.append(BlockUpdate(slot, 0, tuple(request.block_ids)))

    def _try_grow(self, plan: StepPlan, request: Request, chosen: set[Request]) -> bool:
        """See that the next token has a block, if need be a victim's."""
        if request.num_computed_tokens < request.capacity:
            return True
        if not self._try_make_room(request, 1, chosen):
            return False
        plan.block_updates.append(self._tables.append(request))
        return True

    def _try_make_room(self, request: Request, num_blocks: int, chosen: Set[Request] = frozenset()) -> bool:
        """Preempt victims until so many blocks are free."""
        while not self._tables.has_room(num_blocks):
            victim = self._find_victim(request, chosen)
            if victim is None:
                return False
            self._preempt(victim)
        return True

    def _find_victim(self, request: Request, chosen: Set[Request]) -> Request | None:
        """The last in order of those behind the request that do not run in this step."""
        behind = [r for r in self._running.by_slot.values() if r.order > request.order]
        free = (r for r in behind if chosen.isdisjoint(r.together))
        return max(free, key=BY_ORDER, default=None)

    def _preempt(self, request: Request) -> None:
        """Back to the queue, with those that it is together with. Generated tokens are kept; their KV will be
        computed again."""
        for row in request.together:
            self._vacate(row)
            row.status = RequestStatus.PREEMPTED
            insort(self._waiting, row, key=BY_ORDER)
        if request.group is not None:
            self._branching.preempt(request.group)

    def _vacate(self, request: Request) -> None:
        self._running.leave(request)
        self._tables.close(request)

    # results

    def take_scores(self, result: StepResult) -> list[ScoredPrompt]:
        """The scores in the result of a step, by request. To be asked before update() is given it."""
        if not result.prompt_logprobs:
            return []
        scores = iter(result.prompt_logprobs)
        scored = self._outstanding[0].scored
        return [(request, start, list(islice(scores, count))) for request, start, count in scored]

    def update(self, result: StepResult) -> Iterator[AcceptedToken]:
        """Take the results of the steps in order; before step 0 they are empty. Yields each token that counts
        when it has become the last of its request, which may be ended before the next one is asked for.
        Tokens of requests that have finished meanwhile are dropped, those of beams go to their search.

        To be exhausted before the next step is planned.
        """
        if result.step < 0:
            return
        outstanding = self._outstanding.popleft()
        step, requests = outstanding.step, outstanding.sampled
        assert step == result.step, f"result of step {result.step} came, {step} is next"
        assert step + self.config.depth <= self.step, f"tokens of step {step} are not on the first stage yet"
        running = RequestStatus.RUNNING
        logprobs, errors = result.logprobs or [None] * len(requests), result.errors
        for number, entry in enumerate(zip(requests, result.token_ids, logprobs, strict=True)):
            request = entry[0]
            request.num_pending -= 1
            wanted = request.status is running or self._wants_late_token(request)
            if self._verification is not None and request.drafting is not None and request.drafting.token_ids:
                wanted = self._verification.take(request, self.step) and wanted
            if not wanted:
                continue
            if errors and number in errors:
                self.finish(request, "error", errors[number])
                yield request, None, None
            elif request.group is not None:
                if self._branching.take(request, request.group, entry[2]):
                    self._end_search(request.group)
            else:
                self._append(request, entry[1])
                yield entry

    def _append(self, request: Request, token_id: int) -> None:
        request.token_ids.append(token_id)
        if self._verification is not None:
            self._verification.speculation.switch.count(request)
        if token_id in request.stop_token_ids:
            self.finish(request, "stop")
        elif len(request.token_ids) == request.max_total_tokens:
            self.finish(request, "length")

    def _end_search(self, group: BeamRows) -> None:
        for row in group.requests:
            self.finish(row, "stop")

    def _wants_late_token(self, request: Request) -> bool:
        """Of requests that left while the token was on its way, the preempted ones take it still."""
        self._running.release_slot(request)
        return request.status is not RequestStatus.FINISHED

    def check_integrity(self) -> None:
        """Assert that blocks, slots and counts of pending tokens agree with the requests."""
        pending = Counter(request for entry in self._outstanding for request in entry.sampled)
        others = [*self._waiting, *pending]
        self._running.check_integrity(others)
        running = self._running.by_slot.values()
        self._tables.check_integrity(running)
        for group in {r.group for r in running if r.group is not None}:
            group.check_integrity()
        assert all(r.num_pending == pending[r] for r in (*running, *others)), "pending tokens are lost"
