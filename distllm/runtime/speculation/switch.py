"""SpeculationSwitch: whether speculation pays, as measured, for about so many rows. Rank 0 only.

A verification computes several tokens of each row and waits for its result. With few rows that is nearly
free; with many the device is busy without it. Where the border lies depends on model, device and text, so
both ways are timed: tokens a second over a window of steps. Only plans follow from what is measured here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from time import perf_counter

WINDOW = 16  # decisions that are timed together
SETTLING = 3  # of them: results of the other way still arrive; what verifies runs in every second step
LEAST_GAIN = 1.1  # in tokens a second
TRIAL_SHARE = 0.02  # of the time: what may be lost by trying the way that is slower


@dataclass
class _Rates:
    """For one size of batch."""

    by_way: dict[bool, float] = field(default_factory=dict)  # tokens a second, with speculation or without
    lost_s: float = 0.0  # by trials, and not yet made up for

    def add(self, way: bool, rate: float, num_tokens: float, elapsed_s: float) -> None:
        """What a window showed: num_tokens since it had settled; elapsed_s from its first decision on."""
        was_best = way == self.best
        self.by_way[way] = (self.by_way.get(way, rate) + rate) / 2 if was_best else rate
        if len(self.by_way) < 2:
            return
        if way == self.best:
            self.lost_s = max(0.0, self.lost_s - TRIAL_SHARE * elapsed_s)
        else:
            self.lost_s += max(0.0, elapsed_s - num_tokens / self.by_way[self.best])

    @property
    def best(self) -> bool:
        if len(self.by_way) < 2:
            return next(iter(self.by_way), True)
        return self.by_way[True] > LEAST_GAIN * self.by_way[False]

    def next_way(self) -> bool:
        if len(self.by_way) < 2:  # first with, then without
            return not self.by_way
        return self.best if self.lost_s else not self.best


class SpeculationSwitch:
    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._rates: dict[int, _Rates] = {}
        self._bucket, self._way = -1, True
        self._tokens: Counter[Hashable] = Counter()  # of each row, since the window has settled
        self._num_decisions = 0  # of the window
        self._begun_s = self._settled_s = 0.0

    def decide(self, num_rows: int) -> bool:
        """Whether to speculate in the step that is being planned. Batches of up to twice the size count as
        alike."""
        bucket = num_rows.bit_length()
        if bucket != self._bucket:
            self._bucket = bucket
            self._begin()
        elif self._num_decisions == WINDOW:
            self._end(self._rates[bucket])
            self._begin()
        self._num_decisions += 1
        if self._num_decisions == SETTLING:
            self._settled_s = self._clock()
            self._tokens.clear()
        return self._way

    def count(self, row: Hashable) -> None:
        """A token of this row has come."""
        self._tokens[row] += 1

    def disturb(self) -> None:
        """Prompts are computed: what is being timed would say little."""
        self._restart()

    def _end(self, rates: _Rates) -> None:
        """By the harmonic mean over rows: those that are guessed badly are held up by those that are guessed
        well, and are the ones whose users wait."""
        now, counts = self._clock(), self._tokens.values()
        tokens = len(counts) ** 2 / sum(1 / count for count in counts) if counts else 0.0
        rates.add(self._way, tokens / max(now - self._settled_s, 1e-9), tokens, now - self._begun_s)

    def _begin(self) -> None:
        self._way = self._rates.setdefault(self._bucket, _Rates()).next_way()
        self._restart()

    def _restart(self) -> None:
        self._num_decisions = 0
        self._begun_s = self._settled_s = self._clock()
        self._tokens.clear()
