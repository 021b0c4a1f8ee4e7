"""LLM.abort() from inside the loop over stream(), ranks as threads: what was aborted ends at once, nobody
else notices, nothing is held afterwards.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from distllm import LLM, RequestOutput, SamplingParams
from distllm.comm.local import LocalControl, run_ranks
from distllm.errors import DistllmError
from distllm.runtime.request import Request, RequestStatus

LAYOUTS = [(1, 1), (2, 2)]
NUM_PROMPTS = 24
TIGHT: dict[str, Any] = {
    "block_size": 4,
    "max_model_len": 96,
    "max_num_seqs": 9,
    "max_num_batched_tokens": 12,
}


def workload() -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts that share prefixes; every fourth is sampled twice or three times."""
    rng = random.Random(11)
    shared = rng.choices(range(3, 131), k=40)
    prompts = [
        shared[: 9 * (i % 5)] + rng.choices(range(3, 131), k=1 + 4 * (i % 7)) for i in range(NUM_PROMPTS)
    ]
    params = [
        SamplingParams(
            n=1 + i % 3 if i % 4 == 0 else 1, temperature=0.8, seed=i, max_tokens=4 + i, ignore_eos=True
        )
        for i in range(NUM_PROMPTS)
    ]
    return prompts, params


@dataclass
class Stream:
    """What a stream gave, by number of prompt: tokens and end of each sample, and how often it finished."""

    tokens: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    ends: dict[tuple[int, int], str] = field(default_factory=dict)
    finished: Counter[int] = field(default_factory=Counter)

    def take(self, number: int, output: RequestOutput) -> None:
        assert not self.finished[number], "an output after the last one"
        self.finished[number] += output.finished
        for part in output.outputs:
            assert (number, part.index) not in self.ends, "a sample goes on after its end"
            self.tokens.setdefault((number, part.index), []).extend(part.token_ids)
            if part.finish_reason is not None:
                self.ends[number, part.index] = part.finish_reason


InLoop = Callable[[LLM, int], None]  # called after each output; the number of outputs so far


def run_stream(llm: LLM, in_loop: InLoop, first_id: int) -> Stream:
    seen = Stream()
    for count, output in enumerate(llm.stream(*workload())):
        seen.take(int(output.request_id) - first_id, output)
        in_loop(llm, count)
    return seen


def check_nothing_is_held(llm: LLM) -> None:
    scheduler = llm._coordinator._scheduler
    scheduler.check_integrity()
    assert scheduler._tables.blocks.num_used == 0 and not scheduler.has_unfinished
    assert len(scheduler._running.free_slots) == llm.config.max_num_seqs
    assert not llm._coordinator._running and not llm._coordinator._changed


def streams(folder: Path, layout: tuple[int, int], in_loops: list[InLoop], **options: Any) -> list[Stream]:
    """The workload once undisturbed, then once for each of in_loops, on one engine."""
    tp, pp = layout

    def run(control: LocalControl) -> list[Stream]:
        grid = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
        with LLM(str(folder), comm=control, **grid, **(TIGHT | options)) as llm:
            found = []
            for number, in_loop in enumerate([lambda *_: None, *in_loops]):
                found.append(run_stream(llm, in_loop, number * NUM_PROMPTS))
                if llm.is_root:
                    check_nothing_is_held(llm)
            return found

    return run_ranks(tp * pp, run, timeout_s=100)[0]


def check_others_unchanged(plain: Stream, found: Stream) -> None:
    """Every prompt has one last output; every sample its own tokens, all of them unless it was aborted."""
    assert all(found.finished[number] == 1 for number in range(NUM_PROMPTS))
    for key, tokens in plain.tokens.items():
        if found.ends[key] == "abort":
            assert (
                len(found.tokens[key]) < len(tokens) and tokens[: len(found.tokens[key])] == found.tokens[key]
            )
        else:
            assert found.tokens[key] == tokens and found.ends[key] == plain.ends[key]


def standing(request: Request) -> str:
    if request.status is RequestStatus.RUNNING and request.num_uncomputed_tokens > 1:
        return "prefilling"
    return request.status.value


def abort_at_random(rng: random.Random, met: Counter[str]) -> InLoop:
    """In one loop of five: all standings in which there are requests are as likely, rare ones too."""

    def in_loop(llm: LLM, count: int) -> None:
        if rng.random() < 0.8:
            return
        by_standing: dict[str, list[str]] = {"unknown": ["x"]}
        for request_id, generation in llm._coordinator._running.items():
            for request in generation.requests:
                by_standing.setdefault(standing(request), []).append(request_id)
                by_standing.setdefault("pending", []).extend([request_id] * (request.num_pending > 0))
        where = rng.choice(sorted(name for name, ids in by_standing.items() if ids))
        met[where] += 1
        llm.abort(rng.choice(by_standing[where]))

    return in_loop


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_aborts_at_random_moments(tiny: Path, layout: tuple[int, int]) -> None:
    """Few slots and fewer blocks, so that requests wait, are cut into chunks and preempted."""
    met: Counter[str] = Counter()
    block_bytes = 2 * -(-5 // layout[1]) * 4 * (2 // layout[0]) * 8 * 4
    in_loops = [abort_at_random(random.Random(seed), met) for seed in range(3)]
    plain, *found = streams(tiny, layout, in_loops, kv_cache_memory_bytes=30 * block_bytes)
    for stream in found:
        check_others_unchanged(plain, stream)
        assert 3 < sum(end == "abort" for end in stream.ends.values()) < len(stream.ends) - 3
    assert met.keys() == {
        "unknown",
        "waiting",
        "prefilling",
        "running",
        "pending",
        "preempted",
        "finished",
    }, met


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_aborting_all_ends_the_stream_with_one_output_each(tiny: Path, layout: tuple[int, int]) -> None:
    def all_at_first(llm: LLM, count: int) -> None:
        if count == 0:
            for request_id in [*llm._coordinator._running] * 2:
                llm.abort(request_id)

    plain, found = streams(tiny, layout, [all_at_first])
    check_others_unchanged(plain, found)
    assert sum(map(len, found.tokens.values())) < sum(map(len, plain.tokens.values())) / 4
    assert set(found.ends.values()) == {"abort"}


def test_stop_strings_hold_no_text_back_at_an_abort() -> None:
    """What could have become a stop string is given out at the end, as with every other end."""
    base = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    with LLM("demo") as llm:
        text = llm.generate("Once upon a time", SamplingParams(**base))[0].outputs[0].text
        stop = text[:12] + "€"  # held back to its last character, never complete
        streamed = ""
        for output in llm.stream("Once upon a time", SamplingParams(stop=stop, **base)):
            streamed += output.outputs[0].text
            llm.abort(output.request_id)
    assert output.finished and output.outputs[0].finish_reason == "abort"
    assert streamed and text.startswith(streamed)


def refusals(llm: LLM) -> Iterator[str]:
    with pytest.raises(DistllmError, match=r"abort\('0'\) outside of a stream\(\)") as refused:
        llm.abort("0")
    yield str(refused.value)


def test_outside_of_a_stream_it_is_an_error(tiny: Path) -> None:
    def run(control: LocalControl) -> None:
        llm = LLM(str(tiny), tensor_parallel_size=2, comm=control)
        assert list(refusals(llm))
        for output in llm.stream([5, 6], SamplingParams(max_tokens=3, ignore_eos=True)):
            llm.abort("unknown")
            assert output.outputs[0].finish_reason in (None, "length")
        assert list(refusals(llm))
        llm.close()
        assert list(refusals(llm))

    run_ranks(2, run)
