"""Checks of what a user may set: each raises RequestError with the name, the value and the limit."""

from __future__ import annotations

from reprlib import repr as shorten

from distllm.errors import RequestError

MAX_INT = 2**31 - 1  # what plans and slot tables hold


def check_float(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} is {shorten(value)}; it must be a number")
    if not low <= value <= high:  # true of NaN too
        raise RequestError(f"{name} is {shorten(value)}; it must be between {low} and {high}")


def check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} is {shorten(value)}; it must be an integer")
    if not low <= value <= high:
        raise RequestError(f"{name} is {shorten(value)}; it must be between {low} and {high}")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {shorten(value)}; it must be True or False")


def check_above_zero(name: str, value: float, what: str) -> None:
    if value <= 0:
        raise RequestError(f"{name} is {value}; it must be above 0 ({what})")


def check_text(name: str, text: object, max_chars: int) -> None:
    if not isinstance(text, str):
        raise RequestError(f"{name} is {shorten(text)}; it must be a string")
    if not 1 <= len(text) <= max_chars:
        raise RequestError(f"{name} has {len(text)} characters; it must have 1 to {max_chars}")


def check_list(name: str, value: object, max_length: int) -> None:
    if not isinstance(value, list | tuple):
        raise RequestError(f"{name} is {shorten(value)}; it must be a list")
    if len(value) > max_length:
        raise RequestError(f"{name} has {len(value)} entries; at most {max_length} are allowed")
