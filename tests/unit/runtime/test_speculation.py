"""Speculation through the whole engine: whatever is guessed, the tokens are those without."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distllm import LLM, ConfigError, DistllmError, RequestOutput, SamplingParams
from distllm.comm.local import LocalControl, run_ranks
from distllm.runtime.scheduler import Scheduler
from distllm.runtime.speculation.speculation import SpeculationStats
from distllm.runtime.speculation.switch import SpeculationSwitch
from tests import draw_cases
from tests.checkpoints import make_llama
from tests.speculation_cases import informed
from tests.structured_cases import cases, make_folder

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
VOCAB_SIZE = 131


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and another one to draft for it: of the same vocabulary, not of the same opinion."""
    model, draft = (tmp_path_factory.mktemp(name) for name in ("model", "draft"))
    make_llama(model)
    make_llama(draft, seed=1, num_hidden_layers=1)
    return model, draft


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow it is here."""
    monkeypatch.setattr(SpeculationSwitch, "decide", lambda self, num_rows: True)


Results = tuple[list[RequestOutput], SpeculationStats | None]


def generate(
    folder: Path | str, layout: tuple[int, int], prompts: Any, params: Any, **options: Any
) -> Results:
    grid = {"tensor_parallel_size": layout[0], "pipeline_parallel_size": layout[1]}
    options = {"max_num_seqs": 32, "kv_cache_memory_bytes": 2**24} | options

    def run(control: LocalControl) -> Results:
        with LLM(str(folder), comm=control, **grid, **options) as llm:
            return llm.generate(prompts, params), llm.speculation_stats() if llm.is_root else None

    return run_ranks(layout[0] * layout[1], run, timeout_s=110)[0]


def mixed(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of all lengths with all kinds of parameters."""
    rng = random.Random(3)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 50))] for _ in range(count)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"top_p": 0.8, "top_k": 40},
        {"temperature": 0, "repetition_penalty": 1.2, "logprobs": 3},
        {"min_p": 0.01, "n": 3, "logprobs": 0},
        {"temperature": 0, "speculate": False},
        {"presence_penalty": 0.5, "frequency_penalty": 0.2, "no_repeat_ngram_size": 3, "min_tokens": 4},
        {"typical_p": 0.9, "prompt_logprobs": 2},
        {"temperature": 0.5, "stop_token_ids": list(range(3, 20))},
    ]
    params = [
        SamplingParams(seed=i, max_tokens=rng.randrange(4, 24), **kinds[i % len(kinds)]) for i in range(count)
    ]
    return prompts, params


def what_came(outputs: Sequence[RequestOutput]) -> list[Any]:
    return [(list(c.token_ids), c.finish_reason, c.stop_reason) for output in outputs for c in output.outputs]


def check_logprobs(outputs: Sequence[RequestOutput], wanted: Sequence[RequestOutput]) -> None:
    for output, other in zip(outputs, wanted, strict=True):
        for mine, theirs in zip(output.outputs, other.outputs, strict=True):
            for entries, others in zip(mine.logprobs or [], theirs.logprobs or [], strict=True):
                assert [entry.rank for entry in entries.values()] == [e.rank for e in others.values()]
                for token_id, entry in entries.items():
                    assert abs(entry.logprob - others[token_id].logprob) < 1e-4


def texts(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [[*output.prompt_token_ids, *c.token_ids] for output in outputs for c in output.outputs]


@pytest.fixture(scope="module")
def plain(folders: tuple[Path, Path]) -> list[RequestOutput]:
    return generate(folders[0], (1, 1), *mixed(40))[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"max_num_batched_tokens": 4096}, {"max_num_batched_tokens": 17, "block_size": 3}],
    ids=["whole", "chunked"],
)
def test_tokens_and_logprobs_are_those_without(
    folders: tuple[Path, Path], plain: list[RequestOutput], layout: tuple[int, int], options: dict[str, Any]
) -> None:
    config = {
        "method": "custom",
        "proposer": informed(texts(plain), 0.8, VOCAB_SIZE),
        "num_speculative_tokens": 5,
    }
    outputs, stats = generate(folders[0], layout, *mixed(40), speculative_config=config, **options)
    assert what_came(outputs) == what_came(plain)
    check_logprobs(outputs, plain)
    assert stats is not None and 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    assert stats.num_draft_tokens == sum(c.num_draft_tokens for o in outputs for c in o.outputs)
    assert stats.num_accepted_tokens == sum(c.num_accepted_tokens for o in outputs for c in o.outputs)
    assert not any(c.num_draft_tokens for o in outputs[4::8] for c in o.outputs), "they were not to speculate"


@pytest.mark.parametrize(
    ("layout", "draft_tp"), [((1, 1), 1), ((2, 1), 1), ((2, 1), 2), ((2, 2), 2), ((1, 2), 1)]
)
def test_another_model_drafts(
    folders: tuple[Path, Path], plain: list[RequestOutput], layout: tuple[int, int], draft_tp: int
) -> None:
    config = {"method": "draft_model", "model": str(folders[1]), "draft_tensor_parallel_size": draft_tp}
    outputs, stats = generate(
        folders[0], layout, *mixed(40), speculative_config=config, max_num_batched_tokens=40
    )
    assert what_came(outputs) == what_came(plain)
    assert stats is not None and stats.num_draft_tokens > 100


@pytest.mark.parametrize("layout", [(1, 1), (2, 2)], ids=str)
def test_a_model_that_drafts_for_itself_is_always_right(
    folders: tuple[Path, Path], plain: list[RequestOutput], layout: tuple[int, int]
) -> None:
    """Of sampled tokens too: both models draw the same random numbers."""
    config = {"method": "draft_model", "model": str(folders[0]), "num_speculative_tokens": 3}
    outputs, stats = generate(folders[0], layout, *mixed(40), speculative_config=config, block_size=5)
    assert what_came(outputs) == what_came(plain)
    completions = [c for output in outputs for c in output.outputs]
    # Where a stop token came, what was guessed behind it was not looked at.
    assert all(
        c.num_accepted_tokens == c.num_draft_tokens for c in completions if c.finish_reason == "length"
    )
    assert stats is not None and stats.num_draft_tokens > 200 and stats.tokens_per_step > 2.5


@pytest.mark.parametrize("method", ["custom", "draft_model"])
def test_preemption_changes_nothing(
    folders: tuple[Path, Path], plain: list[RequestOutput], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    preempted, preempt = [], Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda self, r: (preempted.append(r), preempt(self, r)))
    how = (
        {"proposer": informed(texts(plain), 0.7, VOCAB_SIZE)}
        if method == "custom"
        else {"model": str(folders[0])}
    )
    # One block of one model: 5 layers · 4 tokens · K and V · 2 heads · 8 · 4 bytes.
    block_bytes = (1 if method == "custom" else 2) * 5 * 4 * 2 * 2 * 8 * 4
    outputs, stats = generate(
        folders[0], (1, 1), *mixed(40), speculative_config={"method": method, **how},
        max_model_len=96, block_size=4, kv_cache_memory_bytes=30 * block_bytes,
    )  # fmt: skip
    assert what_came(outputs) == what_came(plain)
    assert len(preempted) > 3 and stats is not None and stats.num_accepted_tokens > 20


@pytest.mark.parametrize("layout", [(1, 1), (2, 2)], ids=str)
def test_structured_texts_are_guessed_too(tmp_path: Path, layout: tuple[int, int]) -> None:
    folder, forms = make_folder(tmp_path), list(cases(12))
    params = [SamplingParams(structured_outputs=form, seed=i, max_tokens=300) for i, form in enumerate(forms)]
    prompts = [[5 + i] for i in range(len(forms))]
    wanted, _ = generate(folder, (1, 1), prompts, params)
    config = {
        "method": "custom",
        "proposer": informed(texts(wanted), 0.9, VOCAB_SIZE),
        "num_speculative_tokens": 6,
    }
    outputs, stats = generate(folder, layout, prompts, params, speculative_config=config)
    assert what_came(outputs) == what_came(wanted)
    assert stats is not None and stats.num_accepted_tokens > 100


@pytest.mark.parametrize(
    "config",
    [{"method": "draft_model", "model": "demo-draft"}, {"method": "ngram"}],
    ids=lambda c: c["method"],
)
def test_200_prompts_of_the_demo_model(config: dict[str, Any]) -> None:
    words = ["Once upon a time", "The king said", "A little girl", "and then", "the cat", "He went to the"]
    rng = random.Random(1)
    prompts = [" ".join(rng.choices(words, k=rng.randrange(1, 9))) for _ in range(200)]
    params = SamplingParams(temperature=0, max_tokens=32)
    wanted, _ = generate("demo", (1, 1), prompts, params, kv_cache_memory_bytes=2**28)
    outputs, stats = generate(
        "demo",
        (1, 1),
        prompts,
        params,
        max_num_seqs=64,
        kv_cache_memory_bytes=2**28,
        speculative_config=config,
    )
    assert what_came(outputs) == what_came(wanted)
    assert [o.outputs[0].text for o in outputs] == [o.outputs[0].text for o in wanted]
    print(config, stats)
    assert stats is not None and stats.acceptance_rate > 0.2 and stats.tokens_per_step > 1.5


def test_text_ends_in_the_middle_of_what_was_accepted() -> None:
    """A stop string or token among right drafts: nothing behind it is given out."""
    prompt, params = "Once upon a time", SamplingParams(temperature=0, max_tokens=40)
    wanted = generate("demo", (1, 1), prompt, params, kv_cache_memory_bytes=2**27)[0]
    text, token_ids = wanted[0].outputs[0].text, list(wanted[0].outputs[0].token_ids)
    config = {
        "method": "custom",
        "proposer": informed(texts(wanted), 1.0, VOCAB_SIZE),
        "num_speculative_tokens": 7,
    }
    stops: list[dict[str, Any]] = [{"stop": text[n : n + 3]} for n in range(9, 60, 5)]
    stops += [{"stop_token_ids": [token_id]} for token_id in token_ids[3:12]]
    asked = [SamplingParams(temperature=0, max_tokens=40, **stop) for stop in stops]
    alone, _ = generate("demo", (1, 1), [prompt] * len(asked), asked, kv_cache_memory_bytes=2**27)
    outputs, stats = generate(
        "demo", (1, 1), [prompt] * len(asked), asked, speculative_config=config, kv_cache_memory_bytes=2**27
    )
    assert what_came(outputs) == what_came(alone)
    assert [o.outputs[0].text for o in outputs] == [o.outputs[0].text for o in alone]
    assert stats is not None and stats.num_accepted_tokens > 100
    assert {o.outputs[0].finish_reason for o in outputs} == {"stop"}


@pytest.mark.slow
def test_100_000_draws_follow_their_distribution(tmp_path: Path) -> None:
    """With drafts of another model, some right and some wrong."""
    model = draw_cases.make_folder(tmp_path / "model")
    make_llama(tmp_path / "draft", seed=9, vocab_size=draw_cases.VOCAB_SIZE, num_hidden_layers=1)
    config = {"method": "draft_model", "model": str(tmp_path / "draft")}
    for way in ("temperature", "top-k, top-p"):
        outputs, stats = generate(
            tmp_path / "model", (1, 1), draw_cases.prompts(), draw_cases.params(way),
            max_num_seqs=1000, kv_cache_memory_bytes=2**27, block_size=16, speculative_config=config,
        )  # fmt: skip
        draws = np.array([list(output.outputs[0].token_ids) for output in outputs])
        draw_cases.check(model, way, draws, way)
        assert stats is not None and 10_000 < stats.num_accepted_tokens < stats.num_draft_tokens - 10_000


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({}, "method is missing"),
    ({"method": "magic"}, "method is 'magic'; it must be one of ngram, draft_model, custom"),
    ({"method": "ngram", "tokens": 3}, "has no 'tokens'"),
    ({"method": "ngram", "num_speculative_tokens": 0}, "is 0; it must be an integer from 1 to 32"),
    ({"method": "ngram", "num_speculative_tokens": 33}, "is 33"),
    ({"method": "ngram", "num_speculative_tokens": 2.5}, r"is 2\.5"),
    ({"method": "ngram", "prompt_lookup_min": 5}, "prompt_lookup_max is 4; it must be an integer from 5"),
    ({"method": "draft_model"}, "model is missing"),
    ({"method": "ngram", "model": "demo-draft"}, "model is of method 'draft_model' alone"),
    ({"method": "custom"}, "proposer is missing"),
    ({"method": "custom", "proposer": 7}, "proposer is 7; it must be a function"),
    ({"method": "draft_model", "model": 7}, "model is 7; it must be a name or a folder"),
    ("ngram", "speculative_config is 'ngram'; it must be a dict"),  # type: ignore[list-item]
    (5, "speculative_config is 5"),  # type: ignore[list-item]
    ({"method": "draft_model", "model": "demo-draft", "draft_tensor_parallel_size": 2}, "it must be 1 or"),
    ({"method": "draft_model", "model": "/nowhere"}, "/nowhere"),
]


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS)
def test_a_config_that_cannot_work_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(DistllmError, match=message):
        LLM("demo", speculative_config=config)


def test_models_that_do_not_go_together_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 131 tokens, the model's"):
        LLM("demo", speculative_config={"method": "draft_model", "model": str(folders[1])})
    make_llama(tmp_path, max_position_embeddings=64)
    with pytest.raises(ConfigError, match=r"the window of .* is 64, max_model_len is 96"):
        LLM(
            str(folders[0]), max_model_len=96,
            speculative_config={"method": "draft_model", "model": str(tmp_path)},
        )  # fmt: skip


def test_a_guess_that_is_no_token_is_an_error(folders: tuple[Path, Path]) -> None:
    config = {"method": "custom", "proposer": lambda token_ids, count: [VOCAB_SIZE]}
    with (
        pytest.raises(DistllmError, match="token id 131; the vocabulary is 0 … 130"),
        LLM(str(folders[0]), kv_cache_memory_bytes=2**22, max_model_len=64, speculative_config=config) as llm,
    ):
        llm.generate([[5, 6]])
