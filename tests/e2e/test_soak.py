"""The soak, cut short: what ten thousand requests show of leaks, a few hundred show less sharply."""

from __future__ import annotations

import pytest

from tests import launchers

pytestmark = pytest.mark.mpi


def test_soak() -> None:
    args = ("-tp", 2, "-pp", 2, "--requests", 300, "--wave", 30, "--deadline-s", 100)
    code, output = launchers.launcher("openmpi").run(4, "tests/e2e/run_soak.py", *args, timeout_s=110)
    assert code == 0 and "tp 2 pp 2: passed" in output, output
