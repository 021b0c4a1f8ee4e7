"""A state machine drives the scheduler against a simulated device, which knows only the plans.

The device keeps slot rows and KV blocks as the real one does. The KV of a position is the prefix of tokens
that it was computed from: a shared writable block, a missing copy, an early reuse or a wrong cache hit
shows when a row reads its table. The next token is a function of prefix and seed, so that every output has
a reference. Beam searches find what the same search finds without a scheduler.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from distllm.errors import RequestError
from distllm.runtime.beams.beam_rows import BeamRows
from distllm.runtime.beams.beam_search import BeamSearch
from distllm.runtime.beams.beam_search_params import BeamSearchParams
from distllm.runtime.block_manager import extend_digests
from distllm.runtime.plan import PrefillRow, RowSampling, StepPlan, StepResult, TokenLogprobs
from distllm.runtime.plan_codec import decode_message, encode
from distllm.runtime.request import Request
from distllm.runtime.scheduler import AcceptedToken, Scheduler, SchedulerConfig
from distllm.runtime.speculation.drafting import Drafting
from distllm.runtime.speculation.speculation import Speculation

VOCAB_SIZE = 6
STOP_TOKEN = 0
MIN_STEPS = 20_000
BASES = (
    [1, 2, 3, 4, 5] * 8,
    [1, 2, 3, 4, 1] * 8,
    [5, 4] * 20,
)  # prompts are prefixes of these: they share a lot

SEEN: Counter[str] = Counter()  # what the whole run met; a machine that never preempts proves nothing


def next_token(prefix: tuple[int, ...], seed: int) -> int:
    return zlib.crc32(bytes((seed % 251, *prefix))) % VOCAB_SIZE


def logprobs(prefix: tuple[int, ...]) -> TokenLogprobs:
    """Of every token, by a hash: the beams of a search often branch, and often end."""
    values = {token: -(zlib.crc32(bytes((token, *prefix))) % 10007) / 1000 for token in range(VOCAB_SIZE)}
    best = sorted(values, key=lambda token: -values[token])
    return TokenLogprobs(values[0], 1, tuple(best), tuple(values[token] for token in best))


def reference_search(params: BeamSearchParams, prompt: tuple[int, ...]) -> BeamSearch:
    search = new_search(params)
    rows: list[tuple[int, ...]] = [prompt]
    while children := search.advance([logprobs(row) for row in rows]):
        rows = [(*rows[child.parent], child.token_id) for child in children]
    return search


def new_search(params: BeamSearchParams) -> BeamSearch:
    return BeamSearch(params, params.max_tokens, [STOP_TOKEN])


def reference_output(request: Request) -> list[int]:
    """What the request generates alone, one token after the other."""
    tokens = list(request.prompt_token_ids)
    for _ in range(request.max_tokens):
        tokens.append(next_token(tuple(tokens), request.sampling.seed))
        if tokens[-1] in request.stop_token_ids:
            break
    return tokens[request.num_prompt_tokens :]


def batch(plan: StepPlan) -> list[PrefillRow]:
    """Every row in batch order; a decode computes like a prefill of one token."""
    return [*(PrefillRow(slot, 1, True) for slot in plan.decode_slots), *plan.prefills]


@dataclass
class Row:
    seed: int
    token_ids: dict[int, int]  # by position; a sampled token is missing until it arrives
    num_computed: int
    table: list[int] = field(default_factory=list)


class Device:
    """All ranks as one: runs plans in order; sampled tokens reach their rows `depth` steps later."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.rows: dict[int, Row] = {}
        self.kv: dict[tuple[int, int], tuple[int, ...]] = {}  # (block, offset) → prefix
        self.sampled: dict[int, list[tuple[Row, int, int, int]]] = {}  # step → (row, slot, position, token)

    def run(self, plan: StepPlan) -> None:
        self._receive(plan.step - self.config.depth)
        self._apply(plan)
        rows = batch(plan)
        for row in rows:
            self._write(row)
        for row in rows:
            self._check_reads(self.rows[row.slot], row)
        self.sampled[plan.step] = [each for row in rows if row.samples for each in self._sample(row)]
        for row in rows:
            self.rows[row.slot].num_computed += row.num_tokens

    def result(self, step: int) -> StepResult:
        sampled = self.sampled.get(step, [])
        prefixes = [tuple(row.token_ids[p] for p in range(at)) for row, _, at, _ in sampled]
        return StepResult(step, [token for *_, token in sampled], [logprobs(prefix) for prefix in prefixes])

    def _receive(self, step: int) -> None:
        for row, slot, position, token in self.sampled.get(step, []):
            assert self.rows[slot] is row, f"a token comes late to slot {slot}, which has a new owner"
            row.token_ids[position] = token

    def _apply(self, plan: StepPlan) -> None:
        for init in plan.new_rows:
            tokens = dict(enumerate(init.token_ids))
            self.rows[init.slot] = Row(init.sampling.seed, tokens, init.num_computed_tokens)
        for changed in plan.row_updates:
            row = self.rows[changed.slot]
            row.num_computed = changed.num_computed_tokens
            row.token_ids |= dict(enumerate(changed.token_ids, start=changed.start))
        for update in plan.block_updates:
            table = self.rows[update.slot].table
            assert update.start <= len(table), "a gap in a block table"
            table[update.start :] = update.block_ids
        destinations = {dst for _, dst in plan.block_copies}
        assert len(destinations) == len(plan.block_copies), "a block is copied to twice"
        assert destinations.isdisjoint(src for src, _ in plan.block_copies), "a copy of a copy"
        for src, dst in plan.block_copies:
            for offset in range(self.config.block_size):
                self.kv[dst, offset] = self.kv.get((src, offset), ())

    def _place(self, row: Row, position: int) -> tuple[int, int]:
        index, offset = divmod(position, self.config.block_size)
        return row.table[index], offset

    def _write(self, scheduled: PrefillRow) -> None:
        row = self.rows[scheduled.slot]
        for position in range(row.num_computed, row.num_computed + scheduled.num_tokens):
            assert position in row.token_ids, f"slot {scheduled.slot} runs before its token is there"
            prefix = tuple(row.token_ids[p] for p in range(position + 1))
            self.kv[self._place(row, position)] = prefix

    def _check_reads(self, row: Row, scheduled: PrefillRow) -> None:
        end = row.num_computed + scheduled.num_tokens
        prefix = tuple(row.token_ids[p] for p in range(end))
        for position in range(end):
            place = self._place(row, position)
            assert self.kv.get(place) == prefix[: position + 1], f"wrong KV in block, offset {place}"

    def _sample(self, scheduled: PrefillRow) -> list[tuple[Row, int, int, int]]:
        row = self.rows[scheduled.slot]
        last = row.num_computed + scheduled.num_tokens
        ends = range(last - scheduled.num_drafts, last + 1)
        prefixes = [tuple(row.token_ids[p] for p in range(end)) for end in ends]
        return [
            (row, scheduled.slot, end, next_token(prefix, row.seed))
            for end, prefix in zip(ends, prefixes, strict=True)
        ]


@dataclass
class Expectation:
    """What the test knows of one request."""

    request: Request
    stop_after: int | None  # a stop string ends with this token
    received: list[int] = field(default_factory=list)
    ended: bool = False  # by what the scheduler itself sees
    aborted: bool = False

    def check(self) -> None:
        request, expected = self.request, reference_output(self.request)[: self.stop_after]
        output = self.received
        assert output == request.output_token_ids, "a token was lost or came twice"
        assert request.finish_reason is not None, "a request was lost"
        if self.aborted:
            expected = expected[: len(output)]
        assert output == expected, f"{output} instead of {expected}"


class Guesses:
    """A Proposer that is right as often as not, and a switch that nobody can foresee."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def propose(self, wanted: Mapping[Request, int]) -> list[list[int]]:
        return [self._guess(request, self._random.randint(0, count)) for request, count in wanted.items()]

    def _guess(self, request: Request, count: int) -> list[int]:
        assert request.capacity >= len(request.token_ids) + count, "no room for the drafts"
        tokens = request.token_ids.copy()
        for _ in range(count):
            right = next_token(tuple(tokens), request.sampling.seed)
            tokens.append(right if self._random.random() < 0.7 else self._random.randrange(VOCAB_SIZE))
        return tokens[len(request.token_ids) :]

    def decide(self, num_rows: int) -> bool:
        return self._random.random() < 0.8

    def count(self, row: Request) -> None: ...

    def disturb(self) -> None: ...


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        depth=st.sampled_from([1, 2, 4]),
        block_size=st.integers(1, 4),
        num_blocks=st.integers(6, 24),
        max_num_seqs=st.integers(1, 6),
        max_num_batched_tokens=st.integers(1, 24),
        enable_prefix_caching=st.booleans(),
        num_drafts=st.sampled_from([0, 1, 3, 6]),
        seed=st.integers(0, 99),
    )
    def start(self, num_drafts: int, seed: int, **limits: int) -> None:
        self.config = SchedulerConfig(max_model_len=40, **limits)  # type: ignore[arg-type]
        guesses, self.num_drafts = Guesses(seed), num_drafts
        together, self.last_verified = self.config.depth == 1, -1
        self.speculation = Speculation(guesses, num_drafts, guesses, together)  # type: ignore[arg-type]
        self.scheduler = Scheduler(self.config, self.speculation if num_drafts else None)
        self.device = Device(self.config)
        self.expected: dict[Request, Expectation] = {}
        self.searches: list[
            tuple[list[Request], BeamSearch, BeamSearch]
        ] = []  # what it finds, what it should

    @rule(
        base=st.sampled_from(BASES),
        length=st.integers(1, 24),
        max_tokens=st.integers(1, 14),
        priority=st.integers(0, 2),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        stops=st.booleans(),
        stop_after=st.none() | st.integers(1, 10),
    )
    def add(
        self,
        base: list[int],
        length: int,
        max_tokens: int,
        priority: int,
        n: int,
        stops: bool,
        stop_after: int | None,
    ) -> None:
        leader = None
        for index in range(n):
            request = Request(
                request_id=f"{len(self.expected)}",
                prompt_token_ids=tuple(base[:length]),
                max_tokens=max_tokens,
                sampling=RowSampling(temperature=1.0, seed=len(self.expected)),
                stop_token_ids=frozenset([STOP_TOKEN] if stops else []),
                priority=priority,
                fork_from=leader,
                index=index,
                drafting=Drafting(self.num_drafts) if self.num_drafts and index < 2 else None,
            )
            if not self._fits(request):
                with pytest.raises(RequestError):
                    self.scheduler.add(request)
                return
            self.scheduler.add(request)
            self.expected[request] = Expectation(request, stop_after)
            leader = leader or request

    @rule(
        base=st.sampled_from(BASES),
        length=st.integers(1, 16),
        max_tokens=st.integers(1, 12),
        priority=st.integers(0, 2),
        beam_width=st.sampled_from([1, 2, 3, 3]),
        in_groups=st.booleans(),
        length_penalty=st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
        early_stopping=st.sampled_from([True, False, "never"]),
        ignore_eos=st.booleans(),
    )
    def add_beams(self, base: list[int], length: int, priority: int, in_groups: bool, **fields: Any) -> None:
        params = BeamSearchParams(**fields)
        if in_groups and params.beam_width > 1:
            params = replace(params, num_beam_groups=params.beam_width, diversity_penalty=1.0)
        search = new_search(params)
        prompt = tuple(base[:length])
        requests = [
            Request(
                "beam", prompt, params.max_tokens, RowSampling(num_logprobs=VOCAB_SIZE), priority=priority
            )
            for _ in range(params.beam_width)
        ]
        BeamRows(requests, search)
        if not self._fits(requests[0]):
            with pytest.raises(RequestError):
                self.scheduler.add(requests[0])
            return
        for request in requests:
            self.scheduler.add(request)
        self.searches.append((requests, search, reference_search(params, prompt)))

    def _fits(self, request: Request) -> bool:
        num_rows, num_tokens = len(request.together), request.num_prompt_tokens + request.max_tokens
        num_blocks = num_rows * -(-(num_tokens - 1) // self.config.block_size)
        return (
            num_tokens <= 40 and num_blocks <= self.config.num_blocks and num_rows <= self.config.max_num_seqs
        )

    @rule(count=st.integers(1, 6))
    def run_steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        expectation = data.draw(st.sampled_from(list(self.expected.values())))
        expectation.aborted |= expectation.request.finish_reason is None
        self.scheduler.abort(expectation.request)

    @precondition(lambda self: self.searches)
    @rule(data=st.data())
    def abort_beams(self, data: st.DataObject) -> None:
        requests, *_ = data.draw(st.sampled_from(self.searches))
        self.scheduler.abort(data.draw(st.sampled_from(requests)))

    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """Whoever it is, as if another one needed a block."""
        if running := list(self.scheduler._running.by_slot.values()):
            self.scheduler._preempt(data.draw(st.sampled_from(running)))
            self.scheduler.check_integrity()

    def step(self) -> None:
        preempted = {r for r in self.expected if r.status.value == "preempted"}
        preempted_beams = self._preempted_beams()
        plan = self.scheduler.schedule()
        self._check_limits(plan)
        self._check_digests()
        for r in self.expected:
            assert r.num_planned_tokens <= r.num_prompt_tokens + r.max_tokens, "a token that cannot be kept"
        if any(row.num_drafts for row in plan.prefills):
            apart = self.config.depth > 1 or plan.step > self.last_verified + 1
            assert apart, "some are verified while others are"
            self.last_verified = plan.step
        SEEN["steps"] += plan.num_rows > 0
        SEEN["idle"] += plan.num_rows == 0
        SEEN["copies"] += len(plan.block_copies)
        SEEN["cached"] += sum(init.num_computed_tokens > 0 for init in plan.new_rows)
        SEEN["chunks"] += sum(not row.samples for row in plan.prefills)
        SEEN["preempted"] += sum(r.status.value == "preempted" and r not in preempted for r in self.expected)
        SEEN["preempted beams"] += len(self._preempted_beams() - preempted_beams)
        beams = {r.slot for requests, *_ in self.searches for r in requests}
        SEEN["branched"] += sum(update.slot in beams for update in plan.row_updates)
        SEEN["drafts"] += sum(row.num_drafts for row in plan.prefills)
        SEEN["rolled back"] += sum(not update.token_ids for update in plan.row_updates)
        SEEN["right"] = max(SEEN["right"], self.speculation.stats.num_accepted_tokens)
        self.device.run(decode_message(encode(plan)))  # type: ignore[arg-type]
        for token in self.scheduler.update(self.device.result(plan.step - self.config.depth)):
            self._receive(token)
        self.scheduler.check_integrity()

    def _check_digests(self) -> None:
        for request in self.scheduler._running.by_slot.values():
            digests: list[bytes] = []
            extend_digests(digests, request.token_ids, self.config.block_size)
            assert request.block_digests == digests[: len(request.block_digests)], "digests of other tokens"

    def _preempted_beams(self) -> set[Request]:
        return {r for requests, *_ in self.searches for r in requests if r.status.value == "preempted"}

    def _check_limits(self, plan: StepPlan) -> None:
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        slots = plan.slots
        assert len(set(slots)) == len(slots), "a slot runs twice"
        assert all(0 <= slot < self.config.max_num_seqs for slot in slots)
        assert all(row.num_tokens > 0 for row in plan.prefills), "a row without tokens"
        assert not any(row.num_tokens == 1 and row.samples for row in plan.prefills), "this is a decode"
        assert plan.decode_slots == sorted(plan.decode_slots), "decodes are ordered by slot"

    def _receive(self, token: AcceptedToken) -> None:
        request, token_id, _ = token
        expectation = self.expected[request]
        assert token_id is not None, "an error that nothing has caused"
        assert not expectation.ended, "a token after the end"
        assert not expectation.aborted, "a token after the abort"
        expectation.received.append(token_id)
        expectation.ended = request.finish_reason is not None
        if len(expectation.received) == expectation.stop_after:
            self.scheduler.finish(request, "stop", "text")

    def teardown(self) -> None:
        """Whatever came in ends, as it would have alone; then nothing is held."""
        if not hasattr(self, "scheduler"):
            return
        count = len(self.expected) + sum(len(requests) for requests, *_ in self.searches) + 1
        deadline = self.scheduler.step + 40 * (self.config.depth + 1) * count
        while self.scheduler.has_unfinished or self.scheduler.has_outstanding:
            self.step()
            assert self.scheduler.step < deadline, "no end in sight"
        for expectation in self.expected.values():
            expectation.check()
        for requests, search, reference in self.searches:
            reasons = {request.finish_reason for request in requests}
            assert reasons == {"abort"} or (
                reasons == {"stop"} and search.hypotheses == reference.hypotheses
            ), f"{reasons}: {search.hypotheses} instead of {reference.hypotheses}"
            SEEN["searches"] += reasons == {"stop"}
        assert self.scheduler._tables.blocks.num_used == 0
        assert len(self.scheduler._running.free_slots) == self.config.max_num_seqs


@pytest.mark.slow
def test_scheduler_machine() -> None:
    SEEN.clear()
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=800,
            phases=[Phase.generate],  # add Phase.shrink to see a failure in few rules; it takes minutes
            stateful_step_count=40,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(dict(SEEN))
    assert SEEN["steps"] >= MIN_STEPS
    for event in ("copies", "cached", "chunks", "preempted", "branched", "searches"):
        assert SEEN[event] >= 200, f"only {SEEN[event]} {event}"
    assert SEEN["preempted beams"] >= 50
