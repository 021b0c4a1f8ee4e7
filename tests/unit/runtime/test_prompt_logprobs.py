"""Log-probabilities of prompts against transformers: in chunks, by stages, in any batch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from distllm import LLM, SamplingParams
from distllm.comm.local import LocalControl, run_ranks
from distllm.runtime.sampling import sampler
from tests.checkpoints import make_llama

SCHEDULES: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"max_num_batched_tokens": 7, "block_size": 4},
    "few rows, little memory": {"max_num_seqs": 3, "block_size": 4, "max_model_len": 64},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, make_llama(folder, num_hidden_layers=2)


def run(folder: Path, tp: int, pp: int, method: str, *args: Any, **options: Any) -> Any:
    def call(control: LocalControl) -> Any:
        with LLM(
            str(folder), tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=control, **options
        ) as llm:
            return getattr(llm, method)(*args)

    return run_ranks(tp * pp, call, timeout_s=120)[0]


def prompts() -> list[list[int]]:
    rng = random.Random(5)
    shared = [rng.randrange(3, 131) for _ in range(16)]
    own = [[rng.randrange(3, 131) for _ in range(rng.randrange(1, 30))] for _ in range(9)]
    return [shared[: 8 * (i % 3)] + text for i, text in enumerate(own)]


@torch.no_grad()
def reference(model: Any, prompt: list[int]) -> torch.Tensor:
    return model(torch.tensor([prompt])).logits[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_they_are_those_of_transformers(
    model: tuple[Path, Any], tp: int, pp: int, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "SCORED_ROWS", 5)
    (folder, oracle), texts = model, prompts()
    asked = [None, 0, 3, 5, None, 2, 0, 1, 4]
    params = [
        SamplingParams(
            temperature=0, max_tokens=9, ignore_eos=True, prompt_logprobs=k, logprobs=2, n=1 + i % 2
        )
        for i, k in enumerate(asked)
    ]
    options = dict(SCHEDULES[schedule])
    if "few" in schedule:
        options["kv_cache_memory_bytes"] = 64 * 2 * 2 * 2 * 8 * 4 // pp // tp  # one sequence of 64
    outputs = run(folder, tp, pp, "generate", texts, params, **options)
    for text, k, output in zip(texts, asked, outputs, strict=True):
        if k is None:
            assert output.prompt_logprobs is None
            continue
        assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(text)
        expected = reference(oracle, text)
        for token_id, entries, row in zip(text[1:], output.prompt_logprobs[1:], expected, strict=True):
            best = row.topk(k).indices.tolist()
            assert set(entries) == {token_id, *best}
            for number, entry in entries.items():
                assert entry.logprob == pytest.approx(row[number].item(), abs=1e-4)
                assert entry.rank == 1 + int((row > row[number]).sum())


def test_scores(model: tuple[Path, Any]) -> None:
    """What an evaluation harness computes: the sum over a continuation, and whether it is the greedy one."""
    (folder, oracle), texts = model, prompts()
    outputs = run(folder, 1, 2, "score", texts, max_num_batched_tokens=16)
    for text, output in zip(texts, outputs, strict=True):
        expected = reference(oracle, text)
        chosen = expected.gather(1, torch.tensor(text[1:])[:, None])[:, 0]
        assert output.prompt_token_ids == text and len(output.logprobs) == len(text) - 1
        assert output.logprobs == pytest.approx(chosen.tolist(), abs=1e-4)
        assert output.logprob == pytest.approx(chosen.sum().item(), abs=1e-3)
        assert output.is_greedy == (expected.argmax(-1) == torch.tensor(text[1:])).tolist()


def test_a_cached_prefix_is_computed_again(model: tuple[Path, Any]) -> None:
    """Or its scores would be missing."""
    folder, _ = model
    with LLM(str(folder), block_size=4) as llm:
        text = list(range(3, 40))
        plain = llm.generate(text, SamplingParams(max_tokens=1))
        scored = llm.generate(text, SamplingParams(max_tokens=1, prompt_logprobs=0))
        again = llm.generate(text, SamplingParams(max_tokens=1))
    assert (plain[0].num_cached_tokens, scored[0].num_cached_tokens) == (0, 0)
    assert again[0].num_cached_tokens == 36 and None not in scored[0].prompt_logprobs[1:]
