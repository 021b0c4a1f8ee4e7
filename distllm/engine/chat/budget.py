"""What one rendering of a template may cost: steps, spent before the work that they stand for is done.

A step is an item, a node of the template's syntax or 16 characters, so that steps bound the time and the
memory of everything in between. Counts; knows no template.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from itertools import chain
from typing import Any, NamedTuple

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

MAX_STEPS = 2**22
CHARS_PER_STEP = 16


class Measure(NamedTuple):
    """Of a value written out in full: what is held twice counts twice."""

    steps: int
    depth: int = 0  # of lists in lists


class Once(Iterator[Any]):
    """Items to be taken once, as from a generator, that can be measured before."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = list(items)
        self._rest = iter(self.items)

    def __next__(self) -> Any:
        return next(self._rest)


class Budget:
    def __init__(self) -> None:
        self._left = MAX_STEPS
        self._known: dict[int, tuple[Any, Measure]] = {}  # by id, held so that no other value gets it

    def spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise TemplateError(f"it takes more than {MAX_STEPS} steps")

    def measure(self, value: Any) -> Measure:
        """In time of what was not measured before: lists can hold each other so that the steps double."""
        if isinstance(value, str):
            return Measure(1 + len(value) // CHARS_PER_STEP)
        if isinstance(value, int):
            return Measure(1 + value.bit_length() // 8)
        if isinstance(value, range):
            return Measure(1 + len(value), 1)
        parts = _parts(value)
        if parts is None:
            return Measure(1)
        if id(value) not in self._known:
            self._known[id(value)] = value, self._sum(parts)
        return self._known[id(value)][1]

    def _sum(self, parts: Iterable[Any]) -> Measure:
        steps, depth = 1, 0
        for part in parts:
            measure = self.measure(part)
            steps, depth = steps + measure.steps, max(depth, measure.depth)
        return Measure(steps, 1 + depth)


def _parts(value: Any) -> Iterable[Any] | None:
    """None for what is written in a few characters."""
    if isinstance(value, dict):
        return chain(value.keys(), value.values())
    if isinstance(value, list | tuple | KeysView | ValuesView | ItemsView):
        return value
    if isinstance(value, Once):
        return value.items
    if isinstance(value, Namespace):  # can hold itself
        raise SecurityError("a namespace as text")
    return None
