"""benchmarks/bench_structured.py: every form runs on a made-up vocabulary and is compared with none."""

from __future__ import annotations

import json
from pathlib import Path

from tests.checkpoints import make_llama
from tests.command import benchmark

SIZES = ("--batch-size", "2", "--num-steps", "16", "--num-iters", "1")


def test_every_form(tmp_path: Path) -> None:
    shape, file = tmp_path / "shape", tmp_path / "structured.json"
    make_llama(shape, num_hidden_layers=1, max_position_embeddings=1024)
    done = benchmark("bench_structured.py", shape, *SIZES, "-o", file)
    assert done.returncode == 0, done.stderr
    forms = json.loads(file.read_text())["results"]["forms"]
    assert [each["form"] for each in forms] == ["none", "JSON schema", "JSON object", "regex", "grammar"]
    plain = forms[0]["step_s"]["median"]
    assert all(each["of_plain"] == each["step_s"]["median"] / plain > 0 for each in forms)
