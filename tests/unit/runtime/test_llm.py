"""The engine end to end, ranks as threads: every layout, batch and schedule gives transformers' greedy
tokens.
"""

from __future__ import annotations

import gc
import random
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from distllm import LLM, ConfigError, RequestError, SamplingParams
from distllm.comm.local import LocalControl, run_ranks
from distllm.runtime.scheduler import Scheduler
from tests.checkpoints import greedy_reference, make_llama

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]
NUM_TOKENS = 8
SOME = 12  # prompts, where there are many layouts


class Oracle:
    """A checkpoint, random prompts that share prefixes, and their greedy continuations."""

    def __init__(self, folder: Path, num_prompts: int = 32, **overrides: Any) -> None:
        self.folder, rng = folder, random.Random(7)
        model = make_llama(folder, **overrides)
        shared = [rng.randrange(3, 131) for _ in range(40)]
        lengths = [1, 2, 15, 16, 17, 33, 70, *(rng.randrange(1, 60) for _ in range(num_prompts - 7))]
        self.prompts = [
            (shared if number % 3 == 0 else [])[: length - 1] + [rng.randrange(3, 131) for _ in range(length)]
            for number, length in enumerate(lengths)
        ]
        self.expected = [greedy_reference(model, prompt, NUM_TOKENS) for prompt in self.prompts]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def oracle_of_three(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """Six heads, three of them KV."""
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "head_dim": 20}
    return Oracle(tmp_path_factory.mktemp("three"), num_prompts=SOME, **sizes)


def generate(folder: Path, layout: tuple[int, int], prompts: Any, params: Any, **options: Any) -> list[Any]:
    """Rank 0's outputs; the other ranks must return an empty list."""
    tp, pp = layout
    options = {"max_num_seqs": 32} | options  # for a small KV cache: clearing it takes time

    def run(control: LocalControl) -> list[Any]:
        with LLM(
            str(folder), tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=control, **options
        ) as llm:
            return llm.generate(prompts, params)

    results = run_ranks(tp * pp, run, timeout_s=120)
    assert all(result == [] for result in results[1:])
    return results[0]


GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
SCHEDULES: dict[str, dict[str, Any]] = {
    "unchunked": {"max_num_batched_tokens": 4096},
    "chunked": {"max_num_batched_tokens": 13},
    "no prefix cache": {"enable_prefix_caching": False, "max_num_batched_tokens": 64},
    "small blocks": {"block_size": 3, "max_num_batched_tokens": 40},
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_greedy_tokens_are_those_of_transformers(
    oracle: Oracle, layout: tuple[int, int], schedule: str
) -> None:
    outputs = generate(oracle.folder, layout, oracle.prompts[:SOME], GREEDY, **SCHEDULES[schedule])
    assert [list(output.outputs[0].token_ids) for output in outputs] == oracle.expected[:SOME]
    assert all(output.outputs[0].finish_reason == "length" for output in outputs)


@pytest.mark.parametrize("layout", [(1, 1), (2, 2)], ids=str)
def test_one_at_a_time(oracle: Oracle, layout: tuple[int, int]) -> None:
    outputs = generate(oracle.folder, layout, oracle.prompts[:7], GREEDY, max_num_seqs=1)
    assert [list(output.outputs[0].token_ids) for output in outputs] == oracle.expected[:7]


@pytest.mark.parametrize("layout", [(3, 1), (1, 3), (3, 2)], ids=str)
def test_three_ranks(oracle_of_three: Oracle, layout: tuple[int, int]) -> None:
    outputs = generate(
        oracle_of_three.folder, layout, oracle_of_three.prompts, GREEDY, max_num_batched_tokens=50
    )
    assert [list(output.outputs[0].token_ids) for output in outputs] == oracle_of_three.expected


@pytest.mark.parametrize("layout", [(1, 1), (2, 2), (1, 4)], ids=str)
def test_preemption_changes_nothing(
    oracle: Oracle, layout: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    preempted, preempt = [], Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda self, r: (preempted.append(r), preempt(self, r)))
    tp, pp = layout
    # One block: K and V · layers of the largest stage · 4 tokens · KV heads · head_dim · 4 bytes.
    block_bytes = 2 * -(-5 // pp) * 4 * max(1, 2 // tp) * 8 * 4
    outputs = generate(
        oracle.folder,
        layout,
        oracle.prompts,
        GREEDY,
        block_size=4,
        max_model_len=160,
        kv_cache_memory_bytes=60 * block_bytes,
    )
    assert [list(output.outputs[0].token_ids) for output in outputs] == oracle.expected
    assert preempted


@pytest.mark.parametrize("layout", [(1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 5, 31])
def test_batch_sizes(oracle: Oracle, layout: tuple[int, int], batch: int) -> None:
    outputs = generate(oracle.folder, layout, oracle.prompts[:batch], GREEDY)
    assert [list(output.outputs[0].token_ids) for output in outputs] == oracle.expected[:batch]


SEEDED = SamplingParams(
    temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=1234, max_tokens=12, ignore_eos=True
)


def test_a_seeded_request_does_not_see_its_batch_or_layout(oracle: Oracle) -> None:
    """Alone, among 31 others, over tp, pp and both: the same tokens."""
    rng = random.Random(5)
    needle = oracle.prompts[5]
    others = [
        SamplingParams(temperature=rng.choice([0, 0.5, 1.5]), max_tokens=rng.randint(1, 12))
        for _ in range(31)
    ]
    prompts = [*oracle.prompts[:16], needle, *oracle.prompts[16:31]]
    params = [*others[:16], SEEDED, *others[16:]]
    seen = set()
    for layout in [(1, 1), (4, 1), (1, 4), (2, 2)]:
        alone = generate(oracle.folder, layout, needle, SEEDED)
        among = generate(oracle.folder, layout, prompts, params, max_num_batched_tokens=50)
        seen |= {tuple(alone[0].outputs[0].token_ids), tuple(among[16].outputs[0].token_ids)}
    assert len(seen) == 1
    assert len(next(iter(seen))) == 12


@pytest.mark.parametrize("layout", [(1, 1), (2, 2)], ids=str)
def test_n_samples_are_those_of_their_seeds(oracle: Oracle, layout: tuple[int, int]) -> None:
    """Sample i of seed s is what a request with seed s + i gives; the prompt is computed once."""
    prompt = oracle.prompts[6]
    base = {"temperature": 1.0, "max_tokens": 10, "ignore_eos": True}
    together = generate(oracle.folder, layout, prompt, SamplingParams(n=5, seed=40, **base))[0]
    singles = [
        generate(oracle.folder, layout, prompt, SamplingParams(seed=40 + i, **base))[0].outputs[0]
        for i in range(5)
    ]
    assert [output.token_ids for output in together.outputs] == [output.token_ids for output in singles]
    assert [output.index for output in together.outputs] == list(range(5))
    assert len({tuple(output.token_ids) for output in together.outputs}) > 1


@torch.no_grad()
@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=str)
def test_logprobs_are_those_of_transformers(oracle: Oracle, layout: tuple[int, int]) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(oracle.folder)
    params = [
        SamplingParams(temperature=0.8, seed=i, max_tokens=6, logprobs=[0, 3, None][i % 3]) for i in range(6)
    ]
    outputs = generate(oracle.folder, layout, oracle.prompts[:6], params)
    for prompt, param, output in zip(oracle.prompts, params, outputs, strict=False):
        completion = output.outputs[0]
        if param.logprobs is None:
            assert completion.logprobs is None
            continue
        ids = [*prompt, *completion.token_ids]
        exact = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        for row, token, entries in zip(exact, completion.token_ids, completion.logprobs, strict=True):
            expected = {token, *row.topk(param.logprobs).indices.tolist()}
            assert set(entries) == expected
            for entry, value in entries.items():
                assert value.logprob == pytest.approx(row[entry].item(), abs=2e-4)
                assert value.rank == (row > row[entry]).sum().item() + 1
        total = sum(
            entries[token].logprob
            for token, entries in zip(completion.token_ids, completion.logprobs, strict=True)
        )
        assert completion.cumulative_logprob == pytest.approx(total)


def test_stop_tokens_and_min_tokens(oracle: Oracle) -> None:
    """A stop token ends the text where greedy meets it; min_tokens forbids it until then."""
    prompt, expected = oracle.prompts[6], oracle.expected[6]
    stop = expected[4]
    first = expected.index(stop)
    options = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "stop_token_ids": [stop]}
    plain, late = generate(
        oracle.folder,
        (1, 2),
        [prompt, prompt],
        [SamplingParams(**options), SamplingParams(min_tokens=7, **options)],
    )
    assert list(plain.outputs[0].token_ids) == expected[: first + 1]
    assert (plain.outputs[0].finish_reason, plain.outputs[0].stop_reason) == ("stop", stop)
    assert stop not in late.outputs[0].token_ids[:7]
    assert late.outputs[0].token_ids[:first] == expected[:first]


@pytest.mark.parametrize("layout", [(1, 1), (2, 2)], ids=str)
def test_stop_strings_across_token_borders(layout: tuple[int, int]) -> None:
    """Every stop of 6 characters that the demo's greedy text holds cuts it where it first begins, or where it
    ends.
    """
    tp, pp = layout
    prompt, base = "Once upon a time", {"temperature": 0, "max_tokens": 24, "ignore_eos": True}

    def run(control: LocalControl) -> Any:
        grid = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
        with LLM("demo", max_num_seqs=32, comm=control, **grid) as llm:
            plain = llm.generate(prompt, SamplingParams(**base))
            text = control.all_gather_bytes(plain[0].outputs[0].text.encode() if plain else b"")[0].decode()
            stops = [text[at : at + 6] for at in range(5, len(text) - 6, 11)]
            params = [
                SamplingParams(stop=stop, include_stop_str_in_output=include, **base)
                for stop in stops
                for include in (False, True)
            ]
            whole = llm.generate([prompt] * len(params), params)
            streamed = dict.fromkeys(range(len(params)), "")
            first_id = int(whole[0].request_id) + len(params) if whole else 0
            for output in llm.stream([prompt] * len(params), params):
                streamed[int(output.request_id) - first_id] += output.outputs[0].text
            return text, stops, [output.outputs[0] for output in whole], list(streamed.values())

    text, stops, outputs, streamed = run_ranks(tp * pp, run)[0]
    assert len(stops) > 5
    expected = [text[: text.index(stop) + kept] for stop in stops for kept in (0, len(stop))]
    assert [output.text for output in outputs] == expected
    assert streamed == expected
    assert [output.stop_reason for output in outputs] == [stop for stop in stops for _ in range(2)]
    assert {output.finish_reason for output in outputs} == {"stop"}


def test_too_little_kv_memory_is_the_same_error_on_every_rank(oracle: Oracle) -> None:
    """Stages of 3 and 2 layers, so that blocks differ in size; the bytes it asks for are enough."""

    def run(control: LocalControl) -> str:
        options = {"pipeline_parallel_size": 2, "max_model_len": 64, "comm": control}
        with pytest.raises(ConfigError, match="holds 0 tokens, fewer than max_model_len 64") as refused:
            LLM(str(oracle.folder), kv_cache_memory_bytes=1, **options)
        asked = int(re.search(r"kv_cache_memory_bytes to (\d+)", str(refused.value))[1])  # type: ignore[index]
        with LLM(str(oracle.folder), kv_cache_memory_bytes=asked, **options):
            return str(refused.value)

    assert len(set(run_ranks(2, run))) == 1


def test_eos_ends_unless_ignored(tmp_path: Path) -> None:
    model = make_llama(tmp_path, seed=3)
    prompt = [5, 9, 11]
    eos = greedy_reference(model, prompt, 5)[-1]
    make_llama(tmp_path, seed=3, eos_token_id=eos)
    expected = greedy_reference(model, prompt, 20, eos=eos)
    output = generate(tmp_path, (1, 1), prompt, SamplingParams(temperature=0, max_tokens=20))[0].outputs[0]
    assert (list(output.token_ids), output.finish_reason, output.stop_reason) == (expected, "stop", None)


def test_a_refused_prompt_is_refused_on_every_rank_and_harms_no_other(oracle: Oracle) -> None:
    bad = [[], [131], [-1], [1, 2, True], list(range(3, 131)) * 2, "text"]

    def run(control: LocalControl) -> list[Any]:
        with LLM(str(oracle.folder), tensor_parallel_size=2, comm=control) as llm:
            for prompt in bad:
                with pytest.raises(RequestError):
                    llm.generate([oracle.prompts[0], prompt], GREEDY)
            return llm.generate(oracle.prompts[:2], GREEDY)

    outputs = run_ranks(2, run)[0]
    assert [list(output.outputs[0].token_ids) for output in outputs] == oracle.expected[:2]


@pytest.mark.parametrize("layout", [(1, 1), (2, 2)], ids=str)
def test_stream_yields_increments_and_may_be_left_early(oracle: Oracle, layout: tuple[int, int]) -> None:
    tp, pp = layout

    def run(control: LocalControl) -> Any:
        with LLM(str(oracle.folder), tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=control) as llm:
            streamed: dict[str, list[int]] = {}
            for output in llm.stream(oracle.prompts, GREEDY):
                streamed.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)
            for output in llm.stream(oracle.prompts, GREEDY):
                assert output.outputs[0].token_ids
                break
            after = llm.generate(oracle.prompts[0], GREEDY)
            return list(streamed.values()), [list(output.outputs[0].token_ids) for output in after]

    streamed, after = run_ranks(tp * pp, run)[0]
    assert sorted(streamed) == sorted(oracle.expected)
    assert after == oracle.expected[:1]


def test_prefix_cache_is_reported(oracle: Oracle) -> None:
    prompt = oracle.prompts[6]

    def run(control: LocalControl) -> list[int]:
        with LLM(str(oracle.folder), comm=control, block_size=16) as llm:
            return [llm.generate(prompt, GREEDY)[0].num_cached_tokens for _ in range(2)]

    assert run_ranks(1, run)[0] == [0, (len(prompt) - 1) // 16 * 16]


@pytest.mark.parametrize("drafts", [False, True])
def test_a_closed_engine_holds_no_memory(oracle: Oracle, drafts: bool) -> None:
    """Its object may be around while the next one asks what is free."""
    speculation = {"method": "draft_model", "model": str(oracle.folder)} if drafts else None
    llm = LLM(str(oracle.folder), kv_cache_memory_bytes=2**22, speculative_config=speculation)
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3))
    held = [weakref.ref(each) for r in llm._runners for each in (r._decoder.head, r._kv_cache, r._tables)]
    assert len(held) == (6 if drafts else 3) and all(each() is not None for each in held)
    llm.close()
    gc.collect()
    assert not any(each() is not None for each in held)
    llm.close()  # harmless
