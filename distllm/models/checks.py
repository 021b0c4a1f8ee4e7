"""Bounds for numbers that come from files. Raises CheckpointError in one line: name, value, limit."""

from __future__ import annotations

import reprlib

from distllm.errors import CheckpointError


def check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise CheckpointError(f"{name} is {reprlib.repr(value)}; it must be an integer from {low} to {high}")


def check_number(name: str, value: object, low: float, high: float) -> None:
    """NaN and infinities fail the comparison."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise CheckpointError(
            f"{name} is {reprlib.repr(value)}; it must be a number from {low:g} to {high:g}"
        )


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """True is not 1 here."""
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        raise CheckpointError(f"{name} is {reprlib.repr(value)}; supported: {', '.join(map(repr, choices))}")
