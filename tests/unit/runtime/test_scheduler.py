"""Each scheduling rule alone, on plans and results; test_scheduler_machine.py has them all at once."""

from __future__ import annotations

from typing import Any

import pytest

from distllm.errors import ConfigError, RequestError
from distllm.runtime.plan import BlockUpdate, PrefillRow, RowSampling, StepPlan, StepResult, TokenLogprobs
from distllm.runtime.request import Request, RequestStatus
from distllm.runtime.scheduler import AcceptedToken, Scheduler, SchedulerConfig

TOKEN = 7


class Loop:
    """The coordinator's loop, with TOKEN sampled everywhere unless `tokens` of a step say otherwise."""

    def __init__(self, **changes: Any) -> None:
        limits: dict[str, Any] = {
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "max_model_len": 64,
            "block_size": 4,
            "num_blocks": 64,
            "enable_prefix_caching": False,
            "depth": 1,
        }
        self.config = SchedulerConfig(**{**limits, **changes})
        self.scheduler = Scheduler(self.config)
        self.plans: list[StepPlan] = []
        self.tokens: dict[int, int] = {}
        self.accepted: list[AcceptedToken] = []

    def add(self, prompt: int | list[int], max_tokens: int = 8, **fields: Any) -> Request:
        """Queue a request; a number stands for a prompt of that many tokens, unlike any other."""
        base = 1000 * (self.scheduler._num_arrivals + 1)
        ids = tuple(range(base, base + prompt)) if isinstance(prompt, int) else tuple(prompt)
        request = Request("r", ids, max_tokens, RowSampling(), **fields)
        self.scheduler.add(request)
        return request

    def step(self, count: int = 1) -> StepPlan:
        for _ in range(count):
            self.plans.append(self.scheduler.schedule())
            self.accepted += self.scheduler.update(self._result(self.plans[-1].step - self.config.depth))
            self.scheduler.check_integrity()
        return self.plans[-1]

    def run(self) -> None:
        while self.scheduler.has_unfinished or self.scheduler.has_outstanding:
            self.step()
            assert len(self.plans) < 1000

    def _result(self, step: int) -> StepResult:
        sampled = self.plans[step].sampled_slots if step >= 0 else []
        return StepResult(step, [self.tokens.get(step, TOKEN)] * len(sampled))

    def rows(self) -> list[list[tuple[int, int, bool]]]:
        return [
            [(slot, 1, True) for slot in plan.decode_slots]
            + [(row.slot, row.num_tokens, row.samples) for row in plan.prefills]
            for plan in self.plans
        ]


# lag


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_request_runs_again_depth_steps_after_it_sampled(depth: int) -> None:
    loop = Loop(depth=depth)
    request = loop.add(3, max_tokens=3)
    loop.run()
    assert [plan.step for plan in loop.plans if plan.num_rows] == [0, depth, 2 * depth]
    assert request.output_token_ids == [TOKEN] * 3 and request.finish_reason == "length"


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_chunks_of_a_prompt_run_in_consecutive_steps(depth: int) -> None:
    loop = Loop(depth=depth, max_num_batched_tokens=4)
    loop.add(10)
    loop.step(3)
    assert loop.rows() == [[(0, 4, False)], [(0, 4, False)], [(0, 2, True)]]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_finish_by_token_is_seen_late_and_the_extra_token_is_dropped(depth: int) -> None:
    loop = Loop(depth=depth)
    request = loop.add(3, stop_token_ids=frozenset([9]))
    loop.tokens[depth] = 9
    loop.run()
    assert request.output_token_ids == [TOKEN, 9] and request.finish_reason == "stop"
    assert [plan.step for plan in loop.plans if plan.num_rows] == [0, depth, 2 * depth]
    assert [token_id for _, token_id, _ in loop.accepted] == [TOKEN, 9] and request.finish_reason == "stop"


def test_results_must_come_in_order_and_not_before_their_tokens_arrive() -> None:
    scheduler = Loop(depth=2).scheduler
    assert list(scheduler.update(StepResult(-2, []))) == []
    scheduler.schedule()
    with pytest.raises(AssertionError, match="not on the first stage yet"):
        list(scheduler.update(StepResult(0, [])))
    with pytest.raises(AssertionError, match="result of step 5 came, 1 is next"):
        scheduler.schedule()
        list(scheduler.update(StepResult(5, [])))


def test_logprobs_stay_with_their_token() -> None:
    scheduler = Loop().scheduler
    requests = [Request("r", (1, 2), 5, RowSampling()) for _ in range(2)]
    for request in requests:
        scheduler.add(request)
    scheduler.schedule()
    entry = TokenLogprobs(-0.5, 1, (9,), (-0.5,))
    accepted = list(scheduler.update(StepResult(0, [8, 9], [None, entry])))
    assert accepted == [(requests[0], 8, None), (requests[1], 9, entry)]


# budget, order, fairness


def test_microbatches_share_the_decodes_evenly() -> None:
    loop = Loop(depth=2)
    for _ in range(5):
        loop.add(2, max_tokens=40)
    loop.step(12)
    slots = [set(plan.slots) for plan in loop.plans[2:]]
    assert all(len(step) in (2, 3) for step in slots)
    assert all(first | second == set(range(5)) for first, second in zip(slots[::2], slots[1::2], strict=True))


def test_every_decode_gets_its_turn() -> None:
    loop = Loop(depth=3)
    for _ in range(7):
        loop.add(1, max_tokens=40)
    loop.step(33)
    counts = [sum(plan.slots.count(slot) for plan in loop.plans) for slot in range(7)]
    assert max(counts) - min(counts) <= 1 and min(counts) >= 10


def test_decodes_come_before_prefills_and_prefills_before_admissions() -> None:
    loop = Loop(max_num_batched_tokens=8)
    loop.add(2, max_tokens=20)
    loop.step()
    loop.add(10)
    loop.add(6)
    loop.step(3)
    assert loop.rows()[1:] == [
        [(0, 1, True), (1, 7, False)],
        [(0, 1, True), (1, 3, True), (2, 4, False)],
        [(0, 1, True), (1, 1, True), (2, 2, True)],
    ]


def test_rows_hold_decodes_by_slot_first() -> None:
    loop = Loop()
    loop.add(5)
    loop.add(1)
    plan = loop.step()
    assert plan.decode_slots == [1] and plan.prefills == [PrefillRow(0, 5, True)]


def test_admission_by_priority_then_arrival() -> None:
    loop = Loop(max_num_seqs=1)
    requests = [loop.add(2, max_tokens=1, priority=priority) for priority in (1, 0, 1, 0)]
    loop.run()
    assert [request for request, _, _ in loop.accepted] == [requests[i] for i in (1, 3, 0, 2)]


def test_no_more_requests_than_slots() -> None:
    loop = Loop(max_num_seqs=2)
    for _ in range(5):
        loop.add(2, max_tokens=3)
    loop.run()
    assert max(plan.num_rows for plan in loop.plans) == 2 and len(loop.accepted) == 15


# blocks


def test_plans_carry_only_what_changed() -> None:
    loop = Loop()
    request = loop.add(6, max_tokens=9)
    first = loop.step()
    assert [init.slot for init in first.new_rows] == [0] and first.new_rows[
        0
    ].token_ids == request.prompt_token_ids
    assert first.block_updates == [BlockUpdate(0, 0, tuple(request.block_ids))]
    loop.step(8)
    assert all(not plan.new_rows and not plan.block_copies for plan in loop.plans[1:])
    updates = {plan.step: plan.block_updates for plan in loop.plans[1:] if plan.block_updates}
    assert {
        step: [(u.slot, u.start, len(u.block_ids)) for u in found] for step, found in updates.items()
    } == {
        3: [(0, 2, 1)],  # the third decode computes position 8
        7: [(0, 3, 1)],
    }


def test_preemption_takes_the_last_in_order_and_keeps_its_tokens() -> None:
    loop = Loop(num_blocks=6)
    low, high, late = (loop.add(7, max_tokens=6, priority=priority) for priority in (1, 0, 1))
    loop.step(3)  # in the third step all need a third block
    assert late.status is RequestStatus.PREEMPTED and late.output_token_ids == [TOKEN, TOKEN]
    assert low.status is high.status is RequestStatus.RUNNING
    loop.run()
    (again,) = [init for plan in loop.plans[1:] for init in plan.new_rows]
    assert again.token_ids == (*late.prompt_token_ids, TOKEN, TOKEN) and again.num_prompt_tokens == 7
    assert all(request.output_token_ids == [TOKEN] * 6 for request in (low, high, late))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_preempted_request_is_admitted_again_when_nothing_is_pending(depth: int) -> None:
    loop = Loop(num_blocks=4, depth=depth)
    first, second = loop.add(8, max_tokens=8), loop.add(7, max_tokens=8)
    loop.run()
    assert second.output_token_ids == [TOKEN] * 8
    inits = [(plan.step, init) for plan in loop.plans for init in plan.new_rows]
    (step, again) = inits[2]
    assert again.token_ids[:7] == second.prompt_token_ids
    num_sampled = sum(again_slot == 1 for plan in loop.plans[:step] for again_slot in plan.sampled_slots)
    assert len(again.token_ids) == 7 + num_sampled, "a pending token was lost"
    assert first.finish_reason == "length"


def test_a_preempted_request_may_end_by_a_late_token() -> None:
    loop = Loop(num_blocks=4, depth=4)
    loop.add(8, max_tokens=8)
    second = loop.add(8, max_tokens=1)
    loop.tokens[0] = 5
    loop.step(4)
    loop.plans.append(loop.scheduler.schedule())
    assert second.status is RequestStatus.PREEMPTED and second.num_pending == 1
    list(loop.scheduler.update(loop._result(0)))
    assert second.output_token_ids == [5] and second.finish_reason == "length"
    loop.run()
    assert sum(len(plan.new_rows) for plan in loop.plans) == 2


def test_admission_never_preempts() -> None:
    loop = Loop(num_blocks=4)
    running = loop.add(8, max_tokens=5)
    loop.step()
    urgent = loop.add(12, max_tokens=2, priority=-1)
    while running.status is RequestStatus.RUNNING:
        assert urgent.status is RequestStatus.WAITING
        loop.step()
    assert running.finish_reason == "length"
    loop.run()
    assert urgent.finish_reason == "length"


def test_without_anyone_behind_it_a_request_waits_for_blocks() -> None:
    loop = Loop(num_blocks=4)
    loop.add(5, max_tokens=4)
    second = loop.add(7, max_tokens=6)
    loop.run()
    steps = [plan.step for plan in loop.plans if 1 in plan.sampled_slots]
    assert steps == [0, 1, 5, 6, 7, 8], "from step 2 on it needs a block, which is free after step 4"
    assert second.finish_reason == "length" and sum(len(plan.new_rows) for plan in loop.plans) == 2


def test_the_first_in_line_is_not_overtaken() -> None:
    loop = Loop(num_blocks=4)
    loop.add(8, max_tokens=3)
    big, small = loop.add(13, max_tokens=2), loop.add(2, max_tokens=2)
    loop.run()
    order = [request for request, _, _ in loop.accepted[3:]]
    assert order.index(big) < order.index(small)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_slot_is_free_when_its_last_token_has_arrived(depth: int) -> None:
    loop = Loop(depth=depth, max_num_seqs=1)
    first, second = loop.add(2), loop.add(2)
    loop.step()
    loop.scheduler.abort(first)
    loop.run()
    step = next(plan.step for plan in loop.plans[1:] if plan.new_rows)
    assert step == depth + 1 and second.finish_reason == "length"


def test_a_slot_without_tokens_on_their_way_is_free_at_once() -> None:
    loop = Loop(max_num_seqs=1, max_num_batched_tokens=2, depth=4)
    first, _ = loop.add(5), loop.add(2)
    loop.step()
    loop.scheduler.abort(first)
    assert [init.slot for init in loop.step().new_rows] == [0]


# prefix cache


@pytest.mark.parametrize(("length", "num_cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_a_known_prompt_is_computed_from_its_last_block_on(length: int, num_cached: int) -> None:
    loop = Loop(enable_prefix_caching=True)
    prompt = list(range(length))
    first = loop.add(prompt, max_tokens=1)
    loop.run()
    second = loop.add(prompt, max_tokens=1)
    plan = loop.step()
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, num_cached)
    assert plan.new_rows[0].num_computed_tokens == num_cached
    assert loop.rows()[-1] == [(0, length - num_cached, True)] and not plan.block_copies


def test_requests_admitted_together_share_their_prefix() -> None:
    loop = Loop(enable_prefix_caching=True)
    first, second = loop.add([1] * 9), loop.add([1] * 8 + [2] * 3)
    loop.step()
    assert second.num_cached_tokens == 8 and second.block_ids[:2] == first.block_ids[:2]


def test_blocks_that_are_not_planned_yet_are_not_shared() -> None:
    loop = Loop(enable_prefix_caching=True, max_num_batched_tokens=6)
    first = loop.add([1] * 12)
    loop.step()
    urgent = loop.add([1] * 12, priority=-1)
    loop.scheduler.abort(first)
    loop.step()
    assert urgent.num_cached_tokens == 4


def test_generated_tokens_are_cached_once_they_are_known() -> None:
    loop = Loop(enable_prefix_caching=True)
    first = loop.add([1, 2, 3], max_tokens=9)
    loop.run()
    again = loop.add([*first.token_ids, 5, 6])
    loop.step()
    assert again.num_cached_tokens == 8  # of twelve tokens the last was never computed


def test_a_preempted_request_finds_its_own_blocks() -> None:
    loop = Loop(num_blocks=5, enable_prefix_caching=True)
    first, second = loop.add(7, max_tokens=6), loop.add(11, max_tokens=6)
    loop.run()
    (again,) = [init for plan in loop.plans[1:] for init in plan.new_rows]
    assert again.token_ids[:11] == second.prompt_token_ids and again.num_computed_tokens >= 4
    assert second.num_cached_tokens == 0 and first.finish_reason == second.finish_reason == "length"


# forks


def fork(loop: Loop, leader: Request, **fields: Any) -> Request:
    return loop.add(list(leader.prompt_token_ids), fork_from=leader, **fields)


def test_a_follower_waits_for_the_prompt_then_shares_it() -> None:
    loop = Loop(max_num_batched_tokens=4)
    leader = loop.add(6)
    follower = fork(loop, leader)
    loop.step(2)
    assert follower.status is RequestStatus.WAITING, "the prompt is computed in this step"
    plan = loop.step()
    assert follower.num_cached_tokens == 5 and plan.new_rows[0].num_computed_tokens == 5
    assert follower.block_ids[0] == leader.block_ids[0]
    assert plan.block_copies == [(leader.block_ids[1], follower.block_ids[1])]
    assert plan.decode_slots == [0, 1]


def test_a_follower_that_starts_a_fresh_block_copies_nothing() -> None:
    loop = Loop()
    leader = loop.add(9)
    follower = fork(loop, leader)
    loop.step(2)
    assert follower.num_cached_tokens == 8 and follower.block_ids[:2] == leader.block_ids[:2]
    assert follower.block_ids[2] != leader.block_ids[2] and not loop.plans[1].block_copies


def test_a_full_last_block_is_copied_too() -> None:
    loop = Loop(enable_prefix_caching=True)
    leader = loop.add(8)
    followers = [fork(loop, leader) for _ in range(3)]
    plan = loop.step(2)
    assert [follower.num_cached_tokens for follower in followers] == [7, 7, 7]
    assert plan.block_copies == [(leader.block_ids[1], follower.block_ids[1]) for follower in followers]
    assert len({request.block_ids[1] for request in (leader, *followers)}) == 4


def test_others_may_pass_a_follower_that_waits() -> None:
    loop = Loop(max_num_batched_tokens=16)
    leader = loop.add(9)
    follower, other = fork(loop, leader), loop.add(3)
    loop.step()
    assert other.status is RequestStatus.RUNNING and follower.status is RequestStatus.WAITING


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_without_its_leader_a_follower_is_admitted_like_anyone(enable_prefix_caching: bool) -> None:
    loop = Loop(max_num_seqs=1, enable_prefix_caching=enable_prefix_caching)
    leader = loop.add(6, max_tokens=2)
    follower = fork(loop, leader, max_tokens=2)
    loop.run()
    assert follower.num_cached_tokens == (4 if enable_prefix_caching else 0)
    assert follower.output_token_ids == [TOKEN] * 2


def test_a_follower_copies_nothing_that_is_computed_in_the_same_step() -> None:
    loop = Loop(enable_prefix_caching=True)
    loop.add([*range(8), TOKEN, TOKEN], max_tokens=2)  # computes what the leader finds
    leader = loop.add(list(range(8)), max_tokens=2)
    leader.token_ids.append(TOKEN)  # as if it had been preempted
    follower = fork(loop, leader, max_tokens=2)
    plan = loop.step()
    assert leader.num_computed_tokens == 9 and follower.slot < 0 and not plan.block_copies
    assert len(loop.step().block_copies) == 1 and follower.num_cached_tokens == 7


def test_a_follower_does_not_wait_for_a_preempted_leader() -> None:
    loop = Loop(num_blocks=6)
    other = loop.add(8, max_tokens=8, priority=-1)
    leader = loop.add(8, max_tokens=8)
    follower = fork(loop, leader, max_tokens=8)
    loop.run()
    assert all(request.output_token_ids == [TOKEN] * 8 for request in (other, leader, follower))


# coming and going


def test_abort_wherever_the_request_stands() -> None:
    loop = Loop(max_num_seqs=1)
    running, waiting = loop.add(2), loop.add(2)
    unknown = Request("r", (1,), 1, RowSampling())
    loop.step()
    for request in (running, waiting, unknown):
        loop.scheduler.abort(request)
        assert request.finish_reason == "abort"
    assert not loop.scheduler.has_unfinished and loop.scheduler.has_outstanding
    loop.run()
    assert loop.accepted == []
    assert loop.scheduler._running.free_slots == [0]


def test_the_caller_ends_a_request_and_its_later_tokens_are_dropped() -> None:
    loop = Loop(depth=2)
    request = loop.add(2)
    while not loop.accepted:
        loop.step()
    loop.scheduler.finish(request, "stop", "END")
    loop.run()
    assert request.output_token_ids == [TOKEN] and len(loop.accepted) == 1
    assert (request.finish_reason, request.stop_reason) == ("stop", "END")


def test_a_stop_string_in_the_last_token_wins_over_length_and_abort_changes_nothing() -> None:
    loop = Loop()
    request = loop.add(2, max_tokens=1)
    loop.run()
    assert request.finish_reason == "length"
    loop.scheduler.finish(request, "stop", "END")
    loop.scheduler.abort(request)
    assert (request.finish_reason, request.stop_reason) == ("stop", "END")


def test_what_can_never_fit_is_refused() -> None:
    loop = Loop(num_blocks=3, max_model_len=20)
    with pytest.raises(
        RequestError, match=r"prompt of 15 tokens \+ max_tokens 6 is 21; max_model_len is 20: "
    ):
        loop.add(15, max_tokens=6)
    with pytest.raises(RequestError, match="needs 4 KV blocks of 4 tokens and there are 3: "):
        loop.add(8, max_tokens=6)
    assert not loop.scheduler.has_unfinished
    request = loop.add(8, max_tokens=5)
    loop.run()
    assert request.finish_reason == "length"


@pytest.mark.parametrize(
    "name", ["max_num_seqs", "max_num_batched_tokens", "block_size", "num_blocks", "depth"]
)
def test_limits_of_the_config(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0; it must be at least 1"):
        Loop(**{name: 0})
