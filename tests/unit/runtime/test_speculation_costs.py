"""What SpeculationSwitch costs beside whoever knows which way is faster, in a made-up server.

A step takes as long as it did on an H100 (8B shape, a draft model of two layers). As in the engine, plain
steps are planned one ahead, and what verifies runs again when its results are known: drafts, a verification,
and a step in which nothing of it runs.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, repeat

import pytest

from distllm.runtime.speculation.switch import SpeculationSwitch

Costs = list[tuple[int, float]]  # (rows, ms)
PLAIN: Costs = [(1, 5.2), (8, 6.2), (128, 7.9), (256, 10.0)]
DRAFTS: Costs = [(1, 2.2), (8, 4.0), (128, 8.0), (256, 14.0)]
VERIFYING: Costs = [(1, 6.0), (8, 6.0), (128, 16.0), (256, 31.0)]
PROMPT_MS, HOST_MS = 3.5, 0.5


def cost(costs: Costs, num_rows: int) -> float:
    """Seconds, on the line between the two sizes."""
    place = max(1, bisect_left(costs, (num_rows, 0.0)))
    (n0, ms0), (n1, ms1) = costs[place - 1], costs[place]
    return (ms0 + (ms1 - ms0) * (num_rows - n0) / (n1 - n0)) / 1e3


@dataclass(eq=False)
class Row:
    wanted: int  # tokens
    pending: int = 0  # planned, not delivered
    verifies: bool = False
    chance: float = 0.0  # of a draft whose predecessors are right


@dataclass
class Server:
    make_switch: Callable[[Callable[[], float]], SpeculationSwitch]
    num_drafts: int = 4
    chance: float = 0.78  # of rows' drafts
    spread: float = 0.0  # to both sides of it, between rows
    slower: float = 1.0  # drafts and verifications than on that H100
    hiccups: dict[int, float] = field(default_factory=dict)  # by step: seconds
    seed: int = 0

    def __post_init__(self) -> None:
        self.now = self.device_free = 0.0
        self.switch = self.make_switch(lambda: self.now)
        self.rng = random.Random(self.seed)
        self.rows: list[Row] = []
        self.in_flight: list[Row] = []
        self.ends_s = 0.0  # of the last step
        self.num_steps = self.num_tokens = 0

    def serve(self, batch_size: int, lengths: Iterator[int], until_s: float = 1e9) -> float:
        """Rows of these lengths, at most so many at a time, until no more come or the time is over. Returns
        seconds a token."""
        began, before = self.now, self.num_tokens
        while self.now - began < until_s:
            wanted = [n for _, n in zip(range(batch_size - len(self.rows)), lengths, strict=False)]
            new = [Row(n, chance=self.chance + self.rng.uniform(-1, 1) * self.spread) for n in wanted]
            if not (new or self.rows or self.in_flight):
                break
            self._step(new)
        return (self.now - began) / (self.num_tokens - before)

    def _step(self, new: list[Row]) -> None:
        decoding = [row for row in self.rows if row.pending < row.wanted]
        speculates = self.switch.decide(len(decoding))
        if speculates:
            ready = [row for row in decoding if not row.pending]
            if any(row.verifies for row in self.rows):  # all wait for each other
                ready = []
        else:
            ready = [row for row in decoding if not row.verifies]
        if speculates and ready:
            self.now = max(self.now, self.device_free) + self.slower * cost(DRAFTS, len(ready))
        self.now += HOST_MS / 1e3 + self.hiccups.get(self.num_steps, 0.0)
        busy = 0.0
        if ready:
            busy = self.slower * cost(VERIFYING, len(ready)) if speculates else cost(PLAIN, len(ready))
        if new:
            self.switch.disturb()
            busy += len(new) * PROMPT_MS / 1e3
        for row in ready:
            row.verifies, row.pending = speculates, row.pending + 1
        for row in new:
            row.pending = 1
        self.device_free = max(self.now, self.device_free) + busy
        before, self.ends_s = self.ends_s, self.device_free
        delivered, self.in_flight = self.in_flight, ready + new
        self.now = max(self.now, before if delivered else self.now)
        self.rows += new
        for row in delivered:
            self._deliver(row)
        self.num_steps += 1

    def _deliver(self, row: Row) -> None:
        num_right = 0
        while row.verifies and num_right < self.num_drafts and self.rng.random() < row.chance:
            num_right += 1
        row.pending, row.verifies = row.pending - 1, False
        for _ in range(min(1 + num_right, row.wanted)):
            self.switch.count(row)
            row.wanted -= 1
            self.num_tokens += 1
        if not row.wanted:
            self.rows.remove(row)


def always(way: bool) -> Callable[[Callable[[], float]], SpeculationSwitch]:
    class Fixed(SpeculationSwitch):
        def decide(self, num_rows: int) -> bool:
            return way

    return Fixed


def lost(serve: Callable[[Server], float], **options: float) -> float:
    """Share of the time, beside the better of both ways."""
    best = min(serve(Server(always(way), **options)) for way in (True, False))  # type: ignore[arg-type]
    return serve(Server(SpeculationSwitch, **options)) / best - 1  # type: ignore[arg-type]


def spread(seed: int, low: int, high: int) -> Iterator[int]:
    rng = random.Random(seed)
    return (rng.randint(low, high) for _ in count())


@pytest.mark.parametrize("chance", [0.78, 0.2], ids=["good", "bad"])
@pytest.mark.parametrize(("batch_size", "seconds"), [(1, 40), (8, 30), (64, 15), (128, 12)])
def test_long_runs(batch_size: int, seconds: float, chance: float) -> None:
    lengths = lambda: repeat(10**9, batch_size)  # noqa: E731
    assert lost(lambda server: server.serve(batch_size, lengths(), seconds), chance=chance) < 0.04


@pytest.mark.parametrize("chance", [0.78, 0.2])
@pytest.mark.parametrize("batch_size", [8, 64, 128])
def test_rows_come_and_go(batch_size: int, chance: float) -> None:
    """At 128 a prompt comes in every other step."""
    serve = lambda server: server.serve(batch_size, spread(1, 50, 500), 15)  # noqa: E731
    assert lost(serve, chance=chance) < 0.03


@pytest.mark.parametrize("chance", [0.78, 0.2])
def test_prompts_in_every_step(chance: float) -> None:
    """Nothing is left to be timed without them."""
    assert lost(lambda server: server.serve(128, spread(1, 10, 30), 15), chance=chance) < 0.03


@pytest.mark.parametrize("chance", [0.78, 0.4])
def test_batches_that_shrink(chance: float) -> None:
    """Again and again 128 rows that end at different times; behind the first ones it is known what pays."""

    def serve(server: Server) -> float:
        began, before = server.now, server.num_tokens
        for number in range(12):
            lengths = spread(number, 20, 400)
            server.serve(128, (next(lengths) for _ in range(128)))
        return (server.now - began) / (server.num_tokens - before)

    assert lost(serve, chance=chance) < 0.04


@pytest.mark.parametrize("batch_size", [8, 64, 128])
def test_batches_that_end_with_the_row_that_is_guessed_worst(batch_size: int) -> None:
    """All rows are of one length. The mean row may gain by what the last one loses."""

    def serve(server: Server) -> float:
        for _ in range(20):
            server.serve(batch_size, repeat(160, batch_size))
        return server.now

    assert lost(serve, chance=0.75, spread=0.2) < 0.08


@pytest.mark.parametrize("chance", [0.2, 0.6, 0.7])
def test_what_is_known_is_tried_less_and_less(chance: float) -> None:
    """Each trial spreads rows of one length, and the batch waits for the last."""

    def serve(server: Server) -> float:
        server.serve(128, repeat(600, 128))  # finds out
        began = server.now
        for _ in range(12):
            server.serve(128, repeat(288, 128))
        return server.now - began

    assert lost(serve, chance=chance) < 0.006


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_texts_that_change(batch_size: int) -> None:
    """After long in which nothing was guessed, speculation comes back within 20 s, and goes at once."""
    server = Server(SpeculationSwitch, chance=0.01)

    def rate(chance: float, seconds: float) -> float:
        for row in server.rows:
            row.chance = chance
        return server.serve(batch_size, repeat(10**9, batch_size - len(server.rows)), seconds)

    rate(0.01, 60)
    rate(0.95, 20)
    quick = rate(0.95, 10)
    rate(0.01, 1)
    slow = rate(0.01, 10)
    assert quick < 1.03 * steady(True, 0.95, batch_size) and slow < 1.03 * steady(False, 0.01, batch_size)


def steady(way: bool, chance: float, batch_size: int) -> float:
    return Server(always(way), chance=chance).serve(batch_size, repeat(10**9, batch_size), 10)


@pytest.mark.parametrize("chance", [0.78, 0.65])
def test_a_larger_batch_than_ever_before(chance: float) -> None:
    """What was lost by trials with few rows is no reason not to find out about many."""

    def serve(server: Server) -> float:
        for batch_size in (1, 8, 32):
            for _ in range(4):
                server.serve(batch_size, repeat(160, batch_size))
        server.serve(128, repeat(160, 128))
        began = server.now
        for _ in range(5):
            server.serve(128, repeat(160, 128))
        return server.now - began

    assert lost(serve, chance=chance, spread=0.15) < 0.08


@pytest.mark.parametrize("slower", [1.0, 3.0])
@pytest.mark.parametrize("chance", [0.78, 0.4, 0.01])
@pytest.mark.parametrize("batch_size", [1, 8, 128])
def test_a_first_short_run(batch_size: int, chance: float, slower: float) -> None:
    """It has to find out, which costs so many steps."""

    def serve(server: Server) -> float:
        server.serve(batch_size, repeat(160, batch_size))
        return server.now

    best = min(serve(Server(always(way), chance=chance, slower=slower)) for way in (True, False))
    found = serve(Server(SpeculationSwitch, chance=chance, slower=slower))
    verification = slower * (cost(DRAFTS, batch_size) + cost(VERIFYING, batch_size))
    assert found - best < 0.06 + 8 * verification


@pytest.mark.parametrize("sizes", [(127, 128), (90, 92), (100, 110), (45, 46)])
@pytest.mark.parametrize("pays", [True, False])
def test_a_size_that_flaps(sizes: tuple[int, int], pays: bool) -> None:
    """Every three steps, between 127 and 128 and between what may be the borders of sizes."""
    now, ways = 0.0, []
    switch = SpeculationSwitch(lambda: now)
    for step in range(2000):
        way = switch.decide(sizes[step // 3 % 2])
        ways.append(way)
        now += 0.0079 if not way else 0.010 if pays else 0.0225
        if not way or step % 2:
            for row in list(range(sizes[0])) * (3 if way else 1):
                switch.count(row)
    assert (sum(ways[200:]) > 1500) if pays else (sum(ways[200:]) < 300)


@pytest.mark.parametrize("step", [3, 8, 15, 20, 30, 45])
@pytest.mark.parametrize("batch_size", [8, 128])
def test_a_hiccup_decides_nothing(batch_size: int, step: int) -> None:
    """A second is lost in some step at the beginning."""
    chance = 0.78 if batch_size == 8 else 0.2
    server = Server(SpeculationSwitch, hiccups={step: 1.0, step + 1: 0.3}, chance=chance)
    server.serve(batch_size, repeat(10**9, batch_size), 4)
    found = server.serve(batch_size, repeat(0, 0), 12)
    other = Server(always(batch_size == 8), chance=chance)
    assert found < 1.03 * other.serve(batch_size, repeat(10**9, batch_size), 12)
