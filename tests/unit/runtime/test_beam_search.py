"""Beam search through the whole engine: transformers' generate(num_beams=…) decides what is right; of groups
a plain search that agrees with it where there is one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distllm import LLM, BeamSearchOutput, BeamSearchParams, RequestError, SamplingParams
from distllm.comm.local import LocalControl, run_ranks
from distllm.engine import eos_token_ids, resolve_model
from distllm.engine.tokenizers import load_tokenizer
from distllm.runtime.beams.beam_search import BeamSearch, count_logprobs
from distllm.runtime.plan import TokenLogprobs
from distllm.runtime.scheduler import Scheduler
from tests.beam_cases import (
    Case,
    Found,
    cases,
    diverse_reference,
    in_groups,
    logprobs_of,
    reference,
    transformers_reference,
)
from tests.checkpoints import make_llama

EOS = [2, 40, 41]  # many ends: hypotheses finish early and late
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    model = make_llama(folder, num_hidden_layers=2, hidden_size=32, vocab_size=67, eos_token_id=EOS)
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 2.5  # likelier to be either sure or out of the question
    model.save_pretrained(folder)
    return folder, model


@dataclass(frozen=True)
class Oracle:
    """Searches in a checkpoint, every second one in groups, and what there is to find."""

    folder: Path
    batch: list[Case]
    expected: list[Found]


def search(
    folder: Path | str, layout: tuple[int, int], batch: Sequence[tuple[Any, BeamSearchParams]], **options: Any
) -> list[BeamSearchOutput]:
    tp, pp = layout
    prompts, params = map(list, zip(*batch, strict=True))

    def run(control: LocalControl) -> list[BeamSearchOutput]:
        with LLM(
            str(folder), tensor_parallel_size=tp, pipeline_parallel_size=pp, comm=control, **options
        ) as llm:
            outputs = llm.beam_search(prompts, params)
            if llm.is_root:
                scheduler = llm._coordinator._scheduler
                assert scheduler._tables.blocks.num_used == 0 and not scheduler.has_unfinished
                assert len(scheduler._running.free_slots) == llm.config.max_num_seqs
            return outputs

    results = run_ranks(tp * pp, run, timeout_s=120)
    assert all(result == [] for result in results[1:])
    return results[0]


def check(
    outputs: list[BeamSearchOutput], expected: list[Found], batch: list[Case], eos: Sequence[int] = EOS
) -> None:
    for output, wanted, (prompt, params) in zip(outputs, expected, batch, strict=True):
        assert [s.tokens for s in output.sequences] == [tokens for tokens, _ in wanted], params
        for sequence, (_, score) in zip(output.sequences, wanted, strict=True):
            length = len(sequence.tokens) - len(prompt)
            if not params.diversity_penalty:
                assert sequence.score == pytest.approx(sequence.cum_logprob / length**params.length_penalty)
            ends = sequence.tokens[-1] in eos and not params.ignore_eos
            assert sequence.finish_reason == ("stop" if ends else "length")
            if params.beam_width > 1:
                assert sequence.score == pytest.approx(score, abs=1e-4, rel=1e-4)


@pytest.fixture(scope="module")
def oracle(model: tuple[Path, Any]) -> Oracle:
    folder, reference_model = model
    plain, groups = cases(40, seed=1, vocab_size=67), in_groups(cases(40, seed=2, vocab_size=67))
    batch = [case for pair in zip(plain, groups, strict=True) for case in pair]
    return Oracle(folder, batch, [reference(reference_model, case) for case in batch])


SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {"max_num_seqs": 64},
    "chunked, small blocks": {"max_num_batched_tokens": 7, "block_size": 3, "max_num_seqs": 19},
    "few rows, no prefix cache": {"block_size": 4, "max_num_seqs": 11, "enable_prefix_caching": False},
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sequences_are_those_of_transformers(oracle: Oracle, layout: tuple[int, int], schedule: str) -> None:
    count = len(oracle.batch) if layout == (1, 1) else 24
    batch = oracle.batch[:count]
    check(search(oracle.folder, layout, batch, **SCHEDULES[schedule]), oracle.expected[:count], batch)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("layout", [(1, 1), (1, 2)], ids=str)
def test_preemption_changes_nothing(
    oracle: Oracle, layout: tuple[int, int], caching: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for the largest search alone and no more."""
    preempted, preempt = [], Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda self, r: (preempted.append(r), preempt(self, r)))
    few = [i for i, (_, params) in enumerate(oracle.batch) if params.beam_width <= 4]
    batch, expected = [oracle.batch[i] for i in few], [oracle.expected[i] for i in few]
    largest = max(p.beam_width * -(-(len(prompt) + p.max_tokens - 1) // 3) for prompt, p in batch)
    block_bytes = 2 * 2 // layout[1] * 3 * 2 * 4 * 4  # K and V · layers · tokens · KV heads · head_dim · fp32
    outputs = search(
        oracle.folder, layout, batch, block_size=3, max_model_len=60, max_num_batched_tokens=64,
        kv_cache_memory_bytes=largest * block_bytes, enable_prefix_caching=caching,
    )  # fmt: skip
    check(outputs, expected, batch)
    assert preempted


def test_one_group_is_what_transformers_searches(oracle: Oracle, model: tuple[Path, Any]) -> None:
    """The reference for groups, before it is believed."""
    logprobs = logprobs_of(model[1])
    plain = [case for case in oracle.batch if case[1].num_beam_groups == 1 < case[1].beam_width]
    for case in plain:
        mine, wanted = diverse_reference(logprobs, case, EOS), transformers_reference(model[1], case)
        assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in wanted], case[1]
        assert [score for _, score in mine] == pytest.approx([s for _, s in wanted], abs=1e-4, rel=1e-4)
    assert len(plain) >= 30


def make_table(params: BeamSearchParams, eos: list[int], rng: np.random.Generator) -> np.ndarray:
    """Log-probabilities [position, last token, next token]. Where the rows are alike, the groups before take
    what a group wants most; ends of a sequence are among the likeliest tokens too."""
    own = rng.normal(size=(params.max_tokens + 1, 131, 131)) * rng.choice([0.01, 2])
    logits = rng.normal(size=131) * 2 + own
    rank = int(rng.integers(1, params.beam_width + 2))
    logits[..., eos] += np.sort(logits)[..., [-rank]] - logits[..., eos].mean()
    return torch.tensor(logits).log_softmax(-1).numpy()


@pytest.mark.parametrize("seed", range(120))
def test_no_group_misses_a_candidate(seed: int) -> None:
    """Every row tells count_logprobs() of its tokens; the reference knows them all."""
    rng = np.random.default_rng(seed)
    width, eos = int(rng.choice([2, 4, 6, 12, 32])), [2, 40, 41][: 1 + seed % 3]
    count = int(rng.choice([n for n in range(1, width + 1) if width % n == 0]))
    params = BeamSearchParams(
        beam_width=width,
        max_tokens=int(rng.integers(1, 12)),
        length_penalty=float(rng.choice([1.0, 0.0, 2.0, -0.5])),
        early_stopping=([True, False, "never"][seed % 3]),  # type: ignore[arg-type]
        num_beam_groups=count,
        diversity_penalty=float(rng.choice([0.2, 1.0, 3.0, 1e6])) if count > 1 else 0.0,
        ignore_eos=seed % 7 == 6,
    )
    table = make_table(params, eos, rng)

    def result(row: list[int]) -> TokenLogprobs:
        logprobs = table[len(row), row[-1]]
        best = np.argsort(-logprobs)[: count_logprobs(params, eos)]
        return TokenLogprobs(0.0, 1, tuple(best.tolist()), tuple(logprobs[best].tolist()))

    found, rows = BeamSearch(params, params.max_tokens, eos), [[5]]
    while children := found.advance([result(row) for row in rows]):
        assert len(children) == width
        rows = [[*rows[child.parent], child.token_id] for child in children]
    wanted = diverse_reference(
        lambda rows: np.stack([table[len(row), row[-1]] for row in rows]), ([5], params), eos
    )
    assert [h.score for h in found.hypotheses] == pytest.approx([score for _, score in wanted])
    assert sorted([5, *h.token_ids] for h in found.hypotheses) == sorted(tokens for tokens, _ in wanted)


def test_penalties_are_in_the_score_alone(oracle: Oracle, model: tuple[Path, Any]) -> None:
    prompt = oracle.batch[7][0]
    params = BeamSearchParams(
        beam_width=6, max_tokens=9, num_beam_groups=3, diversity_penalty=1.0, length_penalty=0.0,
        ignore_eos=True,
    )  # fmt: skip
    (output,) = search(oracle.folder, (1, 1), [(prompt, params)])
    logprobs = logprobs_of(model[1])
    for sequence in output.sequences:
        ends = range(len(prompt), len(sequence.tokens))
        own = sum(logprobs([sequence.tokens[:end]])[0, sequence.tokens[end]] for end in ends)
        assert sequence.cum_logprob == pytest.approx(own, abs=1e-4)
    penalties = [sequence.cum_logprob - sequence.score for sequence in output.sequences]
    assert penalties == pytest.approx([round(penalty) for penalty in penalties], abs=1e-4)
    assert min(penalties) == 0 and max(penalties) > 0.5


def test_groups_share_blocks(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 tokens of prompt are 20 blocks; each of 8 beams adds two or three of its own."""
    used, schedule = [], Scheduler.schedule
    monkeypatch.setattr(
        Scheduler, "schedule", lambda self: (schedule(self), used.append(self._tables.blocks.num_used))[0]
    )
    params = BeamSearchParams(
        beam_width=8, max_tokens=8, num_beam_groups=4, diversity_penalty=0.5, ignore_eos=True
    )
    search(oracle.folder, (1, 1), [([5, 6, 7, 8] * 20, params)], block_size=4, max_model_len=96)
    assert max(used) <= 20 + 8 * 3


def test_never_looks_at_the_present_length_where_length_costs() -> None:
    """With a negative penalty no length is better than the present one; at max_tokens the beam had lost."""
    params = BeamSearchParams(beam_width=2, max_tokens=100_000, length_penalty=-0.3, early_stopping="never")
    found = BeamSearch(params, params.max_tokens, [9])

    def result(**logprobs: float) -> TokenLogprobs:
        return TokenLogprobs(0.0, 1, tuple(int(name[1:]) for name in logprobs), tuple(logprobs.values()))

    assert found.advance([result(_1=-0.1, _9=-3.0, _2=-3.5, _3=-4.0)]) is not None
    going_on = found.advance([result(_1=-0.1, _9=-3.0, _2=-5.0, _3=-6.0), result(_1=-9, _2=-9, _3=-9, _4=-9)])
    assert [hypothesis.score for hypothesis in found.hypotheses] == pytest.approx([-3.0, -3.1 * 2**0.3])
    assert going_on is not None and -0.2 * 2**0.3 > -3.1 * 2**0.3 > -0.2 * 100_000**0.3


def test_one_end_of_sequence_token(tmp_path: Path) -> None:
    model = make_llama(tmp_path, num_hidden_layers=1, hidden_size=32, vocab_size=40, eos_token_id=2, seed=5)
    batch = cases(24, seed=2, vocab_size=40)
    check(search(tmp_path, (1, 1), batch), [reference(model, case) for case in batch], batch, [2])


def test_demo_model() -> None:
    """Texts too; and the widest search that there may be, of which few sequences are asked for."""
    from transformers import LlamaForCausalLM

    folder = resolve_model("demo")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    widths = {"Once upon a time": (3, None), "The old king": (8, None), "A fox and a crow": (32, 2)}
    params = [BeamSearchParams(beam_width=w, max_tokens=20, n=n) for w, n in widths.values()]
    batch = [(list(tokenizer.encode(text)), p) for text, p in zip(widths, params, strict=True)]
    outputs = search("demo", (1, 1), [(text, p) for text, p in zip(widths, params, strict=True)])
    check(outputs, [reference(model, case) for case in batch], batch, eos_token_ids(folder))
    assert [len(output.sequences) for output in outputs] == [3, 8, 2]
    for text, output in zip(widths, outputs, strict=True):
        for sequence in output.sequences:
            assert sequence.text == tokenizer.decode(sequence.tokens, skip_special_tokens=True)
            assert sequence.text.startswith(text)


def test_max_model_len_ends_a_search(oracle: Oracle, model: tuple[Path, Any]) -> None:
    prompt, params = oracle.batch[5][0], BeamSearchParams(beam_width=4, max_tokens=1000)
    (output,) = search(oracle.folder, (1, 2), [(prompt, params)], max_model_len=len(prompt) + 9)
    shorter = (prompt, replace(params, max_tokens=9))
    check([output], [reference(model[1], shorter)], [shorter])


def test_beams_and_samples_take_turns(oracle: Oracle) -> None:
    """What one call leaves in the prefix cache, the other finds; refusals in between harm nobody."""
    prompt, params = oracle.batch[7]
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)

    def run(control: LocalControl) -> Any:
        options = {"block_size": 3, "max_num_seqs": 8, "max_model_len": 48}
        with LLM(str(oracle.folder), pipeline_parallel_size=2, comm=control, **options) as llm:
            first = llm.generate(prompt, greedy)
            found = llm.beam_search(prompt, params)
            wide = BeamSearchParams(beam_width=9, max_tokens=2)
            for refused, wanted in (
                (([prompt, prompt], wide), "beam_width is 9; max_num_seqs is 8"),
                (([[5], [67]], params), "prompt 1: the prompt holds token id 67"),
                (([[5], [6]], [params]), "params has 1 entries for 2 prompts"),
                (([], params), "the list of prompts is empty"),
            ):
                with pytest.raises(RequestError, match=wanted):
                    llm.beam_search(*refused)
            return first, found, llm.generate(prompt, greedy)

    first, found, again = run_ranks(2, run, timeout_s=60)[0]
    assert first[0].outputs[0].token_ids == again[0].outputs[0].token_ids
    check(found, [oracle.expected[7]], [oracle.batch[7]])


def test_a_search_that_could_not_run_alone_is_refused(oracle: Oracle) -> None:
    with pytest.raises(RequestError, match=r"needs 136 KV blocks .* and there are 33: shorten"):
        params = BeamSearchParams(beam_width=8, max_tokens=60)
        search(oracle.folder, (1, 1), [([5] * 8, params)], block_size=4, max_model_len=128,
               kv_cache_memory_bytes=33 * 2 * 2 * 4 * 2 * 4 * 4)  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("beam_width", value) for value in (0, 33, -1, 2.0, True, None)),
        *(("max_tokens", value) for value in (0, -5, 2**31, 1.5, None)),
        *(("n", value) for value in (0, 5, 2.0, True)),
        *(("length_penalty", value) for value in (float("nan"), float("inf"), -11, 10.5, "1", None)),
        *(("early_stopping", value) for value in ("always", None, 1, 0)),
        *(("ignore_eos", value) for value in (None, 1)),
        *(("num_beam_groups", value) for value in (0, 3, 5, -2, 2.0, True, None)),
        *(("diversity_penalty", value) for value in (float("nan"), float("inf"), -0.1, 2e9, "1", None)),
    ],
)
def test_bounds(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{field} is {value}|^{field} is '{value}'") as refusal:
        BeamSearchParams(**({"beam_width": 4, "max_tokens": 8, "num_beam_groups": 2} | {field: value}))
    assert "\n" not in str(refusal.value)


def test_what_groups_need_is_said() -> None:
    with pytest.raises(RequestError, match=r"^num_beam_groups is 3; it must divide beam_width \(8\)$"):
        BeamSearchParams(beam_width=8, max_tokens=8, num_beam_groups=3)
    with pytest.raises(
        RequestError, match=r"^diversity_penalty is 0.5; .* must be 0: raise num_beam_groups$"
    ):
        BeamSearchParams(beam_width=8, max_tokens=8, diversity_penalty=0.5)
