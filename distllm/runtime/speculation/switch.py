"""SpeculationSwitch: whether speculation pays, as measured, for about so many rows. Rank 0 only.

A verification computes several tokens of each row and waits for its result. With few rows that is nearly
free; with many the device is busy without it. Where the border lies depends on model, device and text, so
both ways are timed: tokens a second over a window of steps. Only plans follow from what is measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

WINDOW = 16  # decisions that are timed together
SETTLING = 2  # of them, in which results of the other way still arrive
MIN_PATIENCE, MAX_PATIENCE = 2, 16  # windows until the way that lost is tried again


@dataclass
class _Rates:
    """For one size of batch."""

    by_way: dict[bool, float] = field(default_factory=dict)  # tokens a second, with speculation or without
    patience: int = MIN_PATIENCE
    num_windows: int = 0  # since the other way was tried

    def add(self, way: bool, rate: float) -> None:
        best = self.best
        self.by_way[way] = (self.by_way.get(way, rate) + rate) / 2
        if len(self.by_way) == 2 and way != best:  # a trial of what had lost, or the first
            self.patience = MIN_PATIENCE if self.best == way else min(2 * self.patience, MAX_PATIENCE)

    @property
    def best(self) -> bool:
        return max(self.by_way, key=self.by_way.__getitem__, default=True)

    def next_way(self) -> bool:
        if len(self.by_way) < 2:  # first with, then without
            return not self.by_way
        self.num_windows += 1
        if self.num_windows <= self.patience:
            return self.best
        self.num_windows = 0
        return not self.best


class SpeculationSwitch:
    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._rates: dict[int, _Rates] = {}
        self._bucket, self._way = -1, True
        self._num_decisions = self._num_tokens = 0
        self._started = 0.0

    def decide(self, num_rows: int) -> bool:
        """Whether to speculate in the step that is being planned. Batches of up to twice the size count as
        alike."""
        bucket = num_rows.bit_length()
        if bucket != self._bucket:
            self._bucket = bucket
            self._begin()
        elif self._num_decisions == WINDOW:
            elapsed = self._clock() - self._started
            self._rates[bucket].add(self._way, self._num_tokens / max(elapsed, 1e-9))
            self._begin()
        self._num_decisions += 1
        if self._num_decisions == SETTLING:
            self._started, self._num_tokens = self._clock(), 0
        return self._way

    def count(self, num_tokens: int) -> None:
        """So many tokens have come."""
        self._num_tokens += num_tokens

    def disturb(self) -> None:
        """Prompts are computed: what is being timed would say little."""
        self._num_decisions = 0

    def _begin(self) -> None:
        self._way = self._rates.setdefault(self._bucket, _Rates()).next_way()
        self._num_decisions = 0
