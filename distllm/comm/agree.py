"""Errors as data: what one rank alone can find out becomes the same error on every rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from distllm import errors

if TYPE_CHECKING:
    from distllm.comm.base import Control

T = TypeVar("T")


def agree(control: Control, work: Callable[[], T]) -> T:
    """Run work() and return its result, unless it raised UserError on any rank: then every rank raises it.

    Collective: every rank of control. work() itself may not enter a collective that a failure would skip.
    The error raised is that of the lowest rank that failed, so that all ranks say the same.
    """
    result, report = None, b""
    try:
        result = work()
    except errors.UserError as error:
        report = json.dumps([type(error).__name__, str(error)]).encode()
    for other in control.all_gather_bytes(report):
        if other:
            kind, text = json.loads(other)
            raise getattr(errors, kind, errors.UserError)(text)
    return result  # type: ignore[return-value]
