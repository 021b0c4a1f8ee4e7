"""Nothing that a step does waits for the device: torch raises where something would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distllm import LLM, SamplingParams, StructuredOutputsParams
from tests.structured_cases import make_folder

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {},
    "top-k, top-p, min-p": {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "typical": {"typical_p": 0.9},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1},
    "bias": {"logit_bias": {7: 2.0, 9: -3.0}, "no_repeat_ngram_size": 2, "bad_words": ["a", "the"]},
    "allowed": {"allowed_token_ids": list(range(5, 90)), "min_tokens": 5, "stop_token_ids": [9]},
    "logprobs": {"logprobs": 3, "prompt_logprobs": 2},
    "structured": {"structured_outputs": StructuredOutputsParams(regex="[a-f]{20,40}")},
    "n": {"n": 3, "top_p": 0.8},
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    folder = make_folder(tmp_path_factory.mktemp("model"))
    limits = {"max_num_seqs": 32, "max_model_len": 256, "max_num_batched_tokens": 64}
    with LLM(str(folder), kv_cache_memory_bytes=2**26, **limits) as made:
        yield made


@pytest.mark.parametrize("way", WAYS)
def test_no_wait(llm: LLM, way: str) -> None:
    prompts = [[5 + (i * n) % 80 for n in range(1, 3 + 9 * i)] for i in range(8)]
    params = SamplingParams(**{"max_tokens": 24, "seed": 1, "ignore_eos": way != "structured"} | WAYS[way])
    llm.generate(prompts, params)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        llm.generate(prompts, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_that_would_be_seen() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.zeros(3, device="cuda").nonzero()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.timeout(200)
@pytest.mark.parametrize("speculation", [[], ["ngram"]], ids=["plain", "ngram"])
def test_nothing_is_compiled_while_requests_wait(speculation: list[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, ROOT / "tests/gpu/run_compiles.py", *speculation]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
