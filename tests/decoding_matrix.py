"""The DecodingMatrix: every pair of features, how a test makes the pair and sees that both were at work.

A cell runs the same requests as a plain engine that knows neither feature, one request at a time; all tokens
must be equal. `python -m tests.decoding_matrix` prints docs/feature-matrix.md from the same table that the
tests go through, so that a ✓ without its test cannot be.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from distllm import BeamSearchParams, RequestOutput, SamplingParams, StructuredOutputsParams
from distllm.runtime.block_tables import BlockTables
from distllm.runtime.cuda_graphs import DecodeGraphs, PromptGraphs
from distllm.runtime.llm import LLM
from distllm.runtime.plan import StepPlan
from distllm.runtime.request import RequestStatus
from distllm.runtime.scheduler import Scheduler
from distllm.runtime.speculation.switch import SpeculationSwitch
from tests.structured_cases import make_folder

FORM = "[ -~]{12,20}"  # wide enough that some drafts are allowed, and narrow enough that others are not
NUM_PROMPTS, PROMPT_LEN, SMALL_CACHE = 8, 40, 60  # the last: KV blocks of 4 tokens
PLAIN: dict[str, Any] = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "max_model_len": 96,
    "block_size": 4,
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 2**23,
    "enforce_eager": True,
}


@dataclass(frozen=True)
class Feature:
    """What it changes in the engine, in each request, and in what the test arranges."""

    options: dict[str, Any] = field(default_factory=dict)  # of LLM
    params: dict[str, Any] = field(default_factory=dict)  # of SamplingParams
    tp: int = 1
    pp: int = 1


FEATURES: dict[str, Feature] = {
    "chunked prefill": Feature({"max_num_batched_tokens": 16}),
    "prefix cache": Feature({"enable_prefix_caching": True}),
    "preemption": Feature(),  # by few KV blocks
    "tp": Feature(tp=2),
    "pp": Feature(pp=2),
    "graphs": Feature({"enforce_eager": False}),
    "overlap": Feature(),  # always on
    "speculation": Feature(),  # by a model that is nearly the same: some drafts are wrong
    "beam": Feature(),  # llm.beam_search
    "structured": Feature(params={"structured_outputs": StructuredOutputsParams(regex=FORM)}),
    "penalties": Feature(
        params={"repetition_penalty": 1.05, "presence_penalty": 1.0, "frequency_penalty": 0.5}
    ),
    "logprobs": Feature(params={"logprobs": 3}),  # and of every other prompt
    "n > 1": Feature(params={"n": 3}),
}

BEAMS_ALONE = "beam search has parameters of its own, without this one: `RequestError`"
# Pairs that cannot be, and why.
IMPOSSIBLE: dict[frozenset[str], str] = {
    frozenset({"beam", name}): BEAMS_ALONE for name in ("structured", "penalties", "logprobs")
} | {
    frozenset({"beam", "overlap"}): "a search must know which beams go on before it computes them",
    frozenset({"beam", "speculation"}): "as before; with `speculative_config` a search runs without",
}
PAIRS = list(combinations(FEATURES, 2))
ON_GPU = [pair for pair in PAIRS if "graphs" in pair]
ON_CPU = [pair for pair in PAIRS if "graphs" not in pair]
Pair = tuple[str, str]


# A feature, and what is called each time that it is at work.
COUNTED: tuple[tuple[str, Any, str], ...] = (
    ("beam", BlockTables, "branch"),
    ("graphs", DecodeGraphs, "replay"),
    ("graphs", PromptGraphs, "replay"),
)


class Seen(Counter[str]):
    """What a scheduler did, by the name of the feature that it shows."""

    def look(self, scheduler: Scheduler, plan: StepPlan) -> None:
        self["chunked prefill"] += sum(not row.samples for row in plan.prefills)
        for request in scheduler._waiting:  # what has no output yet loses nothing
            self["preemption"] += request.status is RequestStatus.PREEMPTED and request.num_output_tokens > 0
        for request in scheduler._outstanding[-1].sampled:
            # Sampled once more although the token before has not come: planned ahead.
            verified = request.drafting is not None and request.drafting.token_ids
            self["overlap"] += request.num_pending > 1 and not verified
            self["prefix cache"] += request.fork_from is None and request.num_cached_tokens > 0

    def counting(self, name: str, function: Any) -> Any:
        """The function, that counts its calls."""

        def counted(*args: Any) -> Any:
            self[name] += 1
            return function(*args)

        return counted


def make_models(folder: Path) -> Path:
    """A model, and in folder/draft one that mostly agrees with it."""
    from transformers import LlamaForCausalLM

    draft = LlamaForCausalLM.from_pretrained(make_folder(folder))
    torch.manual_seed(0)
    with torch.no_grad():
        draft.lm_head.weight += 0.01 * torch.randn_like(draft.lm_head.weight)
    draft.save_pretrained(folder / "draft")
    return folder


@contextmanager
def arranged(pair: Sequence[str]) -> Iterator[Seen]:
    """Few KV blocks for preemption, speculation however slow; and who looks on."""
    seen, schedule = Seen(), Scheduler.schedule

    def watched(self: Scheduler) -> StepPlan:
        plan = schedule(self)
        seen.look(self, plan)
        return plan

    with ExitStack() as patches:
        patches.enter_context(patch.object(Scheduler, "schedule", watched))
        patches.enter_context(patch.object(SpeculationSwitch, "decide", lambda self, num_rows: True))
        for name, owner, method in COUNTED:
            counted = seen.counting(name, getattr(owner, method))
            patches.enter_context(patch.object(owner, method, counted))
        if "preemption" in pair:
            patches.enter_context(patch("distllm.runtime.llm.kv_block_count", lambda *args: SMALL_CACHE))
        yield seen


def prompts() -> list[list[int]]:
    """Two by two they begin alike."""
    return [
        [5 + (3 * (i // 2) + 7 * n + (i % 2) * (n > 30)) % 90 for n in range(PROMPT_LEN)]
        for i in range(NUM_PROMPTS)
    ]


def requests(pair: Sequence[str]) -> list[Any]:
    """Parameters of each prompt: greedy and sampled in turn. Beside speculation and overlap both kinds."""
    if "beam" in pair:
        best = 2 if "n > 1" in pair else None
        return [BeamSearchParams(beam_width=4, max_tokens=12, n=best, ignore_eos=True)] * NUM_PROMPTS
    changes: dict[str, Any] = {}
    for name in pair:
        changes |= FEATURES[name].params
    changes["ignore_eos"] = "structured" not in pair
    alone = {"speculation", "overlap"} == set(pair)
    return [
        SamplingParams(
            temperature=0.8 * (i % 2),
            seed=i,
            max_tokens=24,
            speculate=not (alone and i % 3 == 0),
            prompt_logprobs=2 if "logprobs" in pair and i % 2 else None,
            **changes,
        )
        for i in range(NUM_PROMPTS)
    ]


def options(folder: Path, pair: Sequence[str]) -> dict[str, Any]:
    """Of the LLM, layout left out."""
    chosen = dict(PLAIN)
    for name in pair:
        chosen |= FEATURES[name].options
    if "speculation" in pair:
        chosen["speculative_config"] = {"method": "draft_model", "model": str(folder / "draft")}
    return chosen


def layout(pair: Sequence[str]) -> tuple[int, int]:
    return max(FEATURES[name].tp for name in pair), max(FEATURES[name].pp for name in pair)


def run(llm: LLM, asked: list[Any], batches: list[list[int]]) -> list[Any]:
    """The outputs of requests that run together, batch by batch. Collective."""
    work = llm.beam_search if isinstance(asked[0], BeamSearchParams) else llm.generate
    everything = prompts()
    return [
        output
        for batch in batches
        for output in work([everything[i] for i in batch], [asked[i] for i in batch])  # type: ignore[operator]
    ]


def check_cell(llm: LLM, pair: Sequence[str], plain: list[Any], seen: Seen) -> None:
    """Collective; every rank of a job that was made for the pair. plain: what the plain engine gave."""
    asked, everyone = requests(pair), list(range(NUM_PROMPTS))
    outputs = run(llm, asked, [everyone])
    again = run(llm, asked, [everyone]) if "prefix cache" in pair else []
    if not llm.is_root:
        return
    assert facts(outputs) == facts(plain), "the tokens differ"
    assert not again or facts(again) == facts(plain), "the tokens differ when the cache knows them"
    for found in (outputs, again):
        assert not found or close(logprobs(found), logprobs(plain)), "the log-probabilities differ"
    for name in pair:
        assert was_at_work(name, llm, again or outputs, seen), f"{name} was not at work"


def was_at_work(name: str, llm: LLM, outputs: list[Any], seen: Seen) -> bool:
    match name:
        case "chunked prefill" | "prefix cache" | "preemption" | "overlap" | "graphs" | "beam":
            return seen[name] > 0
        case "tp" | "pp":
            return llm.layout.tp_size > 1 if name == "tp" else llm.layout.pp_size > 1
        case "speculation":
            stats = llm.speculation_stats()
            return stats is not None and 0 < stats.num_accepted_tokens < stats.num_draft_tokens
        case "structured":
            return all(re.fullmatch(FORM, c.text) for output in outputs for c in output.outputs)
        case "logprobs":
            scored = sum(o.prompt_logprobs is not None for o in outputs)
            return scored > 0 and all(len(c.logprobs) == len(c.token_ids) for o in outputs for c in o.outputs)
        case "n > 1":
            return all(len(o.outputs if isinstance(o, RequestOutput) else o.sequences) > 1 for o in outputs)
    return True  # penalties: the tokens show it, for they are not those without


def facts(outputs: list[Any]) -> list[Any]:
    if isinstance(outputs[0], RequestOutput):
        return [[(list(c.token_ids), c.text, c.finish_reason) for c in output.outputs] for output in outputs]
    return [[(s.tokens, s.text, s.finish_reason) for s in output.sequences] for output in outputs]


def logprobs(outputs: list[Any]) -> list[list[float]]:
    """Whatever was given of them, place by place; ascending, since a near tie may fall either way."""
    if not isinstance(outputs[0], RequestOutput):
        return [[s.cum_logprob] for output in outputs for s in output.sequences]
    places = [place for o in outputs for c in o.outputs for place in c.logprobs or []]
    places += [place for o in outputs for place in o.prompt_logprobs or [] if place]
    return [sorted(entry.logprob for entry in place.values()) for place in places]


def close(mine: list[list[float]], theirs: list[list[float]]) -> bool:
    """As many in each place, within 1e-4."""
    return all(
        len(one) == len(other) and all(abs(a - b) < 1e-4 for a, b in zip(one, other, strict=True))
        for one, other in zip(mine, theirs, strict=True)
    )


HEAD = """# Feature matrix

Made by `make docs` from `tests/decoding_matrix.py`, whose cells are tests: the requests of a cell give the
tokens that a plain engine gives to each alone, and both features were seen at work. ✓:
`tests/unit/runtime/test_decoding_matrix.py`, on every machine. G: `tests/gpu/run_matrix.py`, on GPUs, under
every layout. A number: it cannot be, for the reason below.
""".splitlines()


def document() -> str:
    names = list(FEATURES)
    reasons = list(dict.fromkeys(IMPOSSIBLE.values()))
    lines = [*HEAD, "", "| | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for row in names:
        lines.append(f"| {row} | " + " | ".join(_mark(row, column, reasons) for column in names) + " |")
    lines += ["", *(f"{number}. {reason}." for number, reason in enumerate(reasons, 1))]
    return "\n".join(lines)


def _mark(row: str, column: str, reasons: list[str]) -> str:
    if row == column:
        return ""
    reason = IMPOSSIBLE.get(frozenset({row, column}))
    if reason is not None:
        return str(1 + reasons.index(reason))
    return "G" if "graphs" in (row, column) else "✓"


if __name__ == "__main__":
    print(document())
