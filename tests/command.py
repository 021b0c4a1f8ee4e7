"""The distllm command in a process of its own, as a user types it, on one rank."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import launchers

GREEDY = ("--temperature", "0", "--max-tokens", "5")


def distllm(*args: object, prefix: Sequence[str] = (), **options: Any) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-m", "distllm", *map(str, args)]
    defaults = {
        "capture_output": True,
        "text": True,
        "timeout": 60,
        "check": False,
        "env": launchers.clean_environ(),
    }
    return subprocess.run(command, **(defaults | options))


def benchmark(script: str, *args: object, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
    """A script of benchmarks/, as a user starts it."""
    return subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "benchmarks" / script, *map(str, args)],
        env=launchers.clean_environ(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def without_log(output: str) -> str:
    """What was said, less what was logged (`[rank 0 host] INFO …`): launchers join stdout and stderr."""
    return "".join(line for line in output.splitlines(keepends=True) if "] INFO " not in line)


def check_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr, beside the log, that says all of these words."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    said = without_log(done.stderr)
    assert said.startswith("distllm: error: ") and said.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def generate_ids(model: Path, *args: object) -> subprocess.CompletedProcess[str]:
    return distllm("generate", model, *GREEDY, *args)
