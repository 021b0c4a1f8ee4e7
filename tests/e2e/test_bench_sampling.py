"""benchmarks/bench_sampling.py: every way to choose a token runs and is compared with greedy."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import bench_sampling
from tests.command import benchmark


def test_every_way(tmp_path: Path) -> None:
    file = tmp_path / "sampling.json"
    done = benchmark(
        "bench_sampling.py",
        "demo",
        "--batch-size",
        2,
        "--max-model-len",
        256,
        "--num-steps",
        4,
        "--num-iters",
        1,
        "-o",
        file,
    )
    assert done.returncode == 0, done.stderr
    ways = json.loads(file.read_text())["results"]["ways"]
    assert [each["way"] for each in ways] == list(bench_sampling.WAYS)
    greedy = ways[0]["step_s"]["median"]
    assert all(each["of_greedy"] == each["step_s"]["median"] / greedy for each in ways)


def test_a_window_that_is_too_short_is_one_line() -> None:
    done = benchmark("bench_sampling.py", "demo")
    assert done.returncode == 1 and done.stderr.startswith("Error: max_model_len is 4096")
