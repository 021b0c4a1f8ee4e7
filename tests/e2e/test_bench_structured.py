"""benchmarks/bench_structured.py: every form runs on a made-up vocabulary and is compared with none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests import launchers
from tests.checkpoints import make_llama

SCRIPT = Path(__file__).parents[2] / "benchmarks/bench_structured.py"
SIZES = ("--batch-size", "2", "--num-steps", "16", "--num-iters", "1")


def test_every_form(tmp_path: Path) -> None:
    shape, file = tmp_path / "shape", tmp_path / "structured.json"
    make_llama(shape, num_hidden_layers=1, max_position_embeddings=1024)
    done = subprocess.run(
        [sys.executable, SCRIPT, shape, *SIZES, "-o", file],
        env=launchers.clean_environ(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    forms = json.loads(file.read_text())["results"]["forms"]
    assert [each["form"] for each in forms] == ["none", "JSON schema", "JSON object", "regex", "grammar"]
    plain = forms[0]["step_s"]["median"]
    assert all(each["of_plain"] == each["step_s"]["median"] / plain > 0 for each in forms)
