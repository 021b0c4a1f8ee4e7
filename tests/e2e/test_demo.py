"""What a newcomer runs first: the demo on four ranks, and the example script."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests import launchers


@pytest.mark.mpi
@pytest.mark.parametrize("name", launchers.NAMES)
def test_demo_tells_a_tale_and_checks_itself(name: str) -> None:
    code, output = launchers.launcher(name).run(4, "examples/demo.py", timeout_s=100)
    assert code == 0, output
    tale, summary = output.rsplit("\n\n", maxsplit=1)
    assert tale.startswith("Once upon a time") and len(tale.split()) > 20
    speed, verdict = summary.splitlines()
    assert re.fullmatch(r"\d+ tokens/s from tp 2 × pp 2 = 4 ranks", speed)
    assert verdict == "1-rank greedy output is identical (4 prompts, 160 tokens)"


def test_example_script() -> None:
    done = subprocess.run(
        [sys.executable, "examples/generate.py"],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=launchers.ROOT,
        env=launchers.clean_environ() | {"PYTHONPATH": str(launchers.ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "Once upon a time there was" in done.stdout and "The old king said to his daughter" in done.stdout
