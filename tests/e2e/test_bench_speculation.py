"""benchmarks/bench_speculation.py: the pair of models is what it should be, every way is measured."""

from __future__ import annotations

import json
from pathlib import Path

from tests.checkpoints import make_llama
from tests.command import benchmark


def test_every_way(tmp_path: Path) -> None:
    shape, file = tmp_path / "shape", tmp_path / "speculation.json"
    make_llama(shape, vocab_size=400, max_position_embeddings=1024)
    sizes = ("--batch-size", 1, "--batch-size", 2, "--num-tokens", 40, "--num-iters", 1, "--draft-layers", 1)
    done = benchmark("bench_speculation.py", tmp_path / "pair", shape, *sizes, "-o", file)
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())["results"]
    assert [(r["way"], r["batch_size"]) for r in results] == [
        (way, size) for way in ("none", "n-gram", "1 layers") for size in (1, 2)
    ]
    plain, ngram, draft = results[::2]
    assert plain["gain"] == 1 and plain["tokens_per_step"] == 1
    # On a busy machine speculation may be found not to pay: then nothing is guessed.
    assert ngram["acceptance_rate"] > 0.95 or ngram["tokens_per_step"] == 1
    assert 0.2 < draft["acceptance_rate"] < 0.98 or draft["tokens_per_step"] == 1
