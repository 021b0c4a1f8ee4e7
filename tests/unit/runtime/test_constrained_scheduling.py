"""When the scheduler runs rows with a constraint: a slow one not before it has taken their newest token."""

from __future__ import annotations

from typing import Any

import pytest

from distllm.runtime.plan import RowSampling, StepPlan, StepResult
from distllm.runtime.request import Request, RequestStatus
from distllm.runtime.scheduler import Scheduler, SchedulerConfig


class Mask:
    """Stands for the constraint of a request: as many bytes as it has taken tokens."""

    def __init__(self, is_slow: bool) -> None:
        self.mask, self.is_slow = b"", is_slow


class Steps:
    """A scheduler whose steps sample token 7 everywhere."""

    def __init__(self, depth: int, *constrained: bool, is_slow: bool = True) -> None:
        self._is_slow = is_slow
        self.scheduler = Scheduler(SchedulerConfig(9, 64, 64, 4, 40, False, depth))
        self.requests = [self._request(str(number), each) for number, each in enumerate(constrained)]
        self._plans: list[StepPlan] = []
        for request in self.requests:
            self.scheduler.add(request)

    def step(self) -> tuple[StepPlan, list[Request]]:
        """Plan one, and give back the results of the one depth before; also who got a token by that."""
        self._plans.append(plan := self.scheduler.schedule())
        number = plan.step - self.scheduler.config.depth
        tokens = [7] * len(self._plans[number].sampled_slots) if number >= 0 else []
        return plan, [request for request, *_ in self.scheduler.update(StepResult(number, tokens))]

    def take(self, request: Request) -> None:
        constraint: Any = request.constraint
        constraint.mask += b"."
        self.scheduler.resume(request)

    def _request(self, name: str, is_constrained: bool) -> Request:
        constraint: Any = Mask(self._is_slow) if is_constrained else None
        return Request(name, (1, 2, 3), 20, RowSampling(), constraint=constraint)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_it_waits_for_its_mask_and_the_others_do_not(depth: int) -> None:
    steps = Steps(depth, True, False)
    bound, free = steps.requests
    first, _ = steps.step()
    assert len(first.sampled_slots) == 2 and first.token_masks == {bound.slot: b""}
    got: list[Request] = []
    while bound not in got:
        plan, got = steps.step()
        assert bound.slot not in plan.sampled_slots and not plan.token_masks
    for _ in range(3):  # its mask takes long
        plan, _ = steps.step()
        assert bound.slot not in plan.sampled_slots
    assert free.num_planned_tokens > 4
    steps.take(bound)
    plans = [steps.step()[0] for _ in range(depth)]  # at most a depth-th of all decodes in each
    masks = [plan.token_masks for plan in plans if plan.token_masks]
    assert masks == [{bound.slot: b"."}]
    steps.scheduler.check_integrity()


def test_a_preempted_one_is_not_admitted_before_its_mask_is_known() -> None:
    steps = Steps(1, True)
    (bound,) = steps.requests
    steps.step()
    _, got = steps.step()
    assert got == [bound]
    steps.scheduler._preempt(bound)
    plan, _ = steps.step()
    assert plan.num_rows == 0 and bound.status is RequestStatus.PREEMPTED
    steps.take(bound)
    plan, _ = steps.step()
    assert plan.token_masks == {bound.slot: b"."} and plan.num_tokens == 4
    steps.scheduler.check_integrity()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_one_that_is_fast_runs_and_its_mask_comes_after(depth: int) -> None:
    steps = Steps(depth, True, False, is_slow=False)
    bound, free = steps.requests
    first, _ = steps.step()
    assert first.token_masks == {bound.slot: b""} and not first.awaits_masks
    for _ in range(4):
        while bound.slot not in (plan := steps.step()[0]).sampled_slots:
            assert plan.num_rows <= 1 and not plan.awaits_masks
        assert plan.awaits_masks and not plan.token_masks and steps.scheduler.awaiting == [bound]
        assert bound.num_output_tokens == bound.num_tokens_in_mask + 1, (
            "its token has come with this very step"
        )
        steps.take(bound)
    assert abs(free.num_planned_tokens - bound.num_planned_tokens) <= 1, "both run at the same pace"
    steps.scheduler.check_integrity()


def test_one_that_becomes_slow_while_it_runs_ahead_waits_for_what_it_samples() -> None:
    steps = Steps(2, True, is_slow=False)
    (bound,) = steps.requests
    constraint: Any = bound.constraint
    steps.step()
    steps.step()
    constraint.is_slow = True
    plan, _ = steps.step()
    assert steps.scheduler.awaiting == [bound]
    steps.take(bound)
    for _ in range(2):
        assert not steps.step()[0].sampled_slots, "its token is on its way"
    assert bound.num_pending == 0
    steps.take(bound)
    plan, _ = steps.step()
    assert plan.token_masks == {bound.slot: b".."}
