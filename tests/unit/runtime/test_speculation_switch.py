"""SpeculationSwitch on a made-up clock: it finds the faster way, keeps it, and pays little for looking."""

from __future__ import annotations

import pytest

from distllm.runtime.speculation.drafting import Drafting
from distllm.runtime.speculation.switch import SpeculationSwitch


class Engine:
    """Steps that take as long, and yield as many tokens, as the way of the day makes them."""

    def __init__(self, with_s: float, without_s: float) -> None:
        self.step_s = {True: with_s, False: without_s}
        self.tokens = {True: 3, False: 1}
        self.now, self.num_tokens = 0.0, 0
        self.switch = SpeculationSwitch(lambda: self.now)
        self.ways: list[bool] = []

    def run(self, num_steps: int, num_rows: int = 4) -> float:
        """Returns tokens a second."""
        began, before = self.now, self.num_tokens
        for _ in range(num_steps):
            way = self.switch.decide(num_rows)
            self.ways.append(way)
            self.now += self.step_s[way]
            self.num_tokens += num_rows * self.tokens[way]
            for row in range(num_rows):
                for _ in range(self.tokens[way]):
                    self.switch.count(row)
        return (self.num_tokens - before) / (self.now - began)


@pytest.mark.parametrize(
    ("with_s", "without_s"), [(0.010, 0.005), (0.020, 0.005), (0.100, 0.005), (0.005, 0.005), (0.0151, 0.005)]
)
def test_the_faster_way_is_found_and_looking_costs_little(with_s: float, without_s: float) -> None:
    engine = Engine(with_s, without_s)
    engine.run(200)
    best = 4 * max(3 / with_s, 1 / without_s)
    assert engine.run(100_000) > 0.97 * best
    assert set(engine.ways[200:]) == {True, False}, "the other way is never tried again"


def test_it_follows_a_text_that_changes() -> None:
    engine = Engine(0.020, 0.005)
    engine.run(1000)
    engine.step_s[True] = 0.006  # drafts are right now
    engine.run(4000)
    assert engine.run(2000) > 0.95 * 4 * 3 / 0.006


def test_rows_that_are_guessed_badly_count() -> None:
    """One of two rows gets 5 tokens a step, the other one; on the whole 3, but a user waits for each."""
    now, on = 0.0, 0
    switch = SpeculationSwitch(lambda: now)
    for step in range(3000):
        way = switch.decide(2)
        now += 0.010 if way else 0.005
        for row, count in enumerate((5, 1) if way else (1, 1)):
            for _ in range(count):
                switch.count(row)
        on += way and step > 1000
    assert on < 200


def test_sizes_of_batches_are_judged_apart() -> None:
    engine = Engine(0.006, 0.005)
    engine.run(500, num_rows=1)
    engine.step_s[True] = 0.050
    engine.run(500, num_rows=100)
    assert sum(engine.ways[-400:]) < 100
    engine.step_s[True] = 0.006
    engine.ways.clear()
    engine.run(100, num_rows=1)
    assert sum(engine.ways) > 60


def test_prompts_in_between_are_not_timed() -> None:
    engine = Engine(0.006, 0.005)
    for _ in range(300):
        engine.run(10)
        if engine.ways[-1]:
            engine.now += 10.0  # a long prompt
            engine.switch.disturb()
    engine.ways.clear()
    engine.run(500)
    assert sum(engine.ways) > 300


def verify(drafting: Drafting, num_drafts: int, num_right: int) -> int:
    """What the limit is after a verification."""
    drafting.begin(10, tuple(range(num_drafts)))
    known = list(range(10))
    for number in range(num_drafts + 1):
        assert drafting.takes(number, known) == (number <= num_right)
        if number <= num_right:
            known.append(number if number < num_right else -1)
    drafting.end()
    return drafting.limit


def test_drafts_grow_and_shrink_with_what_was_right() -> None:
    drafting = Drafting(4)
    assert [verify(drafting, 4, 4), verify(drafting, 6, 6)] == [9, 13]
    for _ in range(20):
        limit = verify(drafting, 4, 0)
    assert limit == 1 and (drafting.num_drafted, drafting.num_accepted) == (90, 10)
    assert verify(drafting, 1, 1) == 3, "one that is right lets more follow"
    for _ in range(30):
        limit = verify(drafting, 4, 3)  # 3 of 4 tried
    assert limit == 4  # 0.75 ** 4 is above a quarter
