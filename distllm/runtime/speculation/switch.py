"""SpeculationSwitch: whether speculation pays, as measured, for about so many rows. Rank 0 only.

A verification computes several tokens of each row and waits for its result. With few rows that is nearly
free; with many the device is busy without it. Where the border lies depends on model, device and text, so
both ways are timed: how long a row waits for a token. The slower way is tried again when what its trials lost
is a small share of the time, smaller with each that finds nothing new; and a trial ends as soon as it has
lost too much. A size of batch that nobody has timed goes the way of the nearest one that is known. Only plans
follow from what is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from math import log2
from time import perf_counter

WINDOW, FIRST_WINDOW = 8, 3  # stretches until a way is judged; the first one has nothing to be judged by
LEAST_GAIN = 1.05  # in tokens a second
TRIAL_SHARE = 0.01  # of the time: what may be lost by trying the way that is slower; at first
LEAST_SHARE = 0.002  # half of it with each trial that finds nothing new, down to this
MOST_LOST_S = 0.02  # by a trial, before it ends
NEWS = 0.25  # of the pace of the faster way: what the last window counts


class _Window:
    """What came of decisions for one way."""

    def __init__(self, num_settling: int) -> None:
        """num_settling: decisions, the first ones, whose tokens are not counted."""
        self.num_decisions, self._num_settling = 0, num_settling
        self.stretches: list[float] = []  # seconds a decision
        self._rows: dict[Hashable, list[int]] = {}  # first and last decision with tokens, and those behind

    def count(self, row: Hashable) -> None:
        if self.num_decisions <= self._num_settling:
            return
        seen = self._rows.setdefault(row, [self.num_decisions, 0, 0])
        if self.num_decisions > seen[0]:
            seen[1] = self.num_decisions
            seen[2] += 1

    @property
    def decisions_per_token(self) -> float:
        """Mean over rows, each from its first tokens to its last: those that are guessed badly are held up by
        those that are guessed well, and are the ones whose users wait. 0 if nothing is known."""
        each = [(last - first) / num_tokens for first, last, num_tokens in self._rows.values() if num_tokens]
        return sum(each) / len(each) if each else 0.0

    @property
    def pace(self) -> float:
        """Tokens a second of a row; 0 if it is not known."""
        waiting_s = self.decisions_per_token * self.seconds
        return 1 / waiting_s if waiting_s else 0.0

    @property
    def seconds(self) -> float:
        """A decision's, by the quicker stretches: hiccups and prompts belong to neither way."""
        return sorted(self.stretches)[len(self.stretches) // 4] if self.stretches else 0.0

    def lost_s(self, pace: float) -> float:
        """In all, against this other pace: what the decisions took beyond what their tokens would have. Those
        that tell nothing yet are taken for lost.
        """
        if not self.pace:
            return self.num_decisions / pace
        return self.num_decisions * max(0.0, self.seconds - 1 / (self.decisions_per_token * pace))

    def is_losing(self, pace: float) -> bool:
        """Whether it is clear by now."""
        return len(self.stretches) > 1 and self.pace > 0 and self.lost_s(pace) > MOST_LOST_S


class SpeculationSwitch:
    def __init__(self, clock: Callable[[], float] = perf_counter, cycle: int = 2) -> None:
        """cycle: steps from one verification of a row to its next: one more than there are stages."""
        self._clock = clock
        self._cycle, self._settling = cycle, cycle + 1  # until results of the other way or of prompts are in
        self._paces: dict[int, dict[bool, float]] = {}  # by size of batch, then with speculation or without
        self._bucket, self._way = -1, True
        self._rival = 0.0  # pace of the way that is faster, while the other is tried
        self._lost_s = 0.0  # by trials, and not yet made up for
        self._share = TRIAL_SHARE
        self._window = _Window(self._settling)
        self._now_s = self._stretch_s = clock()  # of the last decision; when the stretch began
        self._num_timed = 0  # decisions of the stretch
        self._unsettled = self._settling

    def decide(self, num_rows: int) -> bool:
        """Whether to speculate in the step that is being planned. Batches count as alike around a power of
        two; those between two of them as what they were before, so that no border is crossed to and fro."""
        if not num_rows:
            return self._way
        self._tick()
        size = log2(num_rows)
        if abs(size - self._bucket) > 0.75:
            self._end()
            self._begin(round(size))
        elif self._is_over():
            self._end()
            self._begin(self._bucket)
        self._window.num_decisions += 1
        return self._way

    def count(self, row: Hashable) -> None:
        """A token of this row has come."""
        self._window.count(row)

    def disturb(self) -> None:
        """Prompts are computed: what is being timed would say little."""
        self._unsettled = self._settling

    def _tick(self) -> None:
        """The last decision has been carried out."""
        now, before = self._clock(), self._now_s
        self._now_s = now
        self._lost_s = max(0.0, self._lost_s - self._share * (now - before))
        if self._unsettled:
            self._unsettled -= 1
            self._stretch_s, self._num_timed = now, 0
            return
        self._num_timed += 1
        if self._num_timed == self._cycle:
            self._window.stretches.append((now - self._stretch_s) / self._cycle)
            self._stretch_s, self._num_timed = now, 0

    def _is_over(self) -> bool:
        if self._num_timed or not self._window.stretches:
            return False
        is_first = not self._rival and self._way not in self._paces[self._bucket]
        if len(self._window.stretches) >= (FIRST_WINDOW if is_first else WINDOW):
            return True
        return self._rival > 0 and self._window.is_losing(self._rival)

    def _end(self) -> None:
        pace, known = self._window.pace, self._paces.get(self._bucket, {})
        if self._rival:
            self._lost_s += self._window.lost_s(self._rival)
            self._share = max(LEAST_SHARE, self._share / 2)
        if pace and len(self._window.stretches) > 1:
            best, before = self._best(self._bucket), known.get(self._way, pace)
            known[self._way] = pace if self._rival else before + NEWS * (pace - before)
            if self._best(self._bucket) != best:
                self._lost_s, self._share = 0.0, TRIAL_SHARE  # the other way is tried at once: is it so?

    def _begin(self, bucket: int) -> None:
        known, best, before = self._paces.setdefault(bucket, {}), self._best(bucket), self._way
        is_owing = self._lost_s > 0 and len(known) == 2  # a way that was never timed is tried all the same
        tries = best in known and not is_owing
        self._bucket, self._way = bucket, best != tries
        self._rival = known[best] if tries else 0.0
        self._stretch_s, self._num_timed = self._now_s, 0
        num_settling = self._settling if self._way != before else 0
        self._window = _Window(num_settling)
        self._unsettled = max(self._unsettled, num_settling)

    def _best(self, bucket: int) -> bool:
        """Of the nearest size of which both ways are known."""
        both = [size for size, paces in self._paces.items() if len(paces) == 2]
        if not both:
            return True
        paces = self._paces[min(both, key=lambda size: abs(size - bucket))]
        return paces[True] > LEAST_GAIN * paces[False]
