"""Waiting: prompt, patient without burning a core, and over at the deadline."""

from __future__ import annotations

import threading
import time

import pytest

from distllm.comm.waiting import wait_until
from distllm.errors import CommTimeout


def test_deadline_names_the_wait() -> None:
    start = time.monotonic()
    with pytest.raises(CommTimeout, match=r"all_reduce on tp: no answer .* 0.05 s"):
        wait_until(lambda: False, "all_reduce on tp", 0.05)
    assert 0.05 <= time.monotonic() - start < 1


def test_done_already_costs_one_test() -> None:
    calls = []
    wait_until(lambda: calls.append(1) or True, "", 0.0)  # type: ignore[func-returns-value]
    assert len(calls) == 1


def test_deadline_is_checked_after_a_last_test() -> None:
    answers = iter([False, True])
    wait_until(lambda: next(answers), "", 0.0)


@pytest.mark.parametrize("timeout_s", [60, None])
def test_long_waits_sleep(timeout_s: float | None) -> None:
    """Of 0.4 s of waiting, at most a tenth is spent on the processor (measured: about 0.005 s)."""
    done = threading.Event()
    threading.Timer(0.4, done.set).start()
    start = time.thread_time()
    wait_until(done.is_set, "", timeout_s)
    assert time.thread_time() - start < 0.04
