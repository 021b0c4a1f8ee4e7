"""How a rank waits: it yields, then sleeps, and gives up at a deadline. Knows a test function, no transport.

Spinning inside MPI_Wait would be quicker by a few microseconds, but burns a core while idle, starves the
peers when ranks outnumber cores, and cannot time out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from distllm.errors import CommTimeout

YIELD_S = 0.002  # a collective among ranks in step ends within this; a sleep would add its own latency to it
SHORT_SLEEP_S = 0.0001  # then: a peer that computes for some milliseconds more
LONG_SLEEP_S = 0.0015  # reached after 0.14 s: nothing to do. About 1.5 % of a core


def wait_until(test: Callable[[], bool], what: str, timeout_s: float | None) -> None:
    """Return when test() is true. Raises CommTimeout, naming `what`, after timeout_s; None waits for ever."""
    if test():
        return
    start = time.monotonic()
    while not test():
        waited = time.monotonic() - start
        if waited < YIELD_S:
            os.sched_yield()
        elif timeout_s is None or waited < timeout_s:
            time.sleep(min(SHORT_SLEEP_S + waited / 100, LONG_SLEEP_S))
        else:
            raise CommTimeout(f"{what}: no answer from the other ranks within {timeout_s:g} s")
