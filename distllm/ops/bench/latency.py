"""`bench latency`: time per decode step, gaps between tokens, and time to the first token, beside the floors.

Decode is timed on whole generate() calls, so the engine runs as it always does: two calls that differ by
output_len tokens differ by as many steps of the full batch. Every rank runs these; rank 0's times count.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise

from distllm.errors import ConfigError
from distllm.ops.bench.floors import Floors
from distllm.ops.bench.timing import Summary, summarize
from distllm.runtime.llm import LLM
from distllm.runtime.sampling.sampling_params import SamplingParams

NUM_STEADY_STEPS = 8  # of the shorter call, beyond the steps in which prompts are still computed
NUM_FIRST_TOKENS = 4  # of a request whose first token is timed: it goes on, as a user's would

Prompts = list[list[int]]


@dataclass(frozen=True)
class LatencyWorkload:
    """Lengths in tokens. Every batch size runs with every prompt length."""

    input_lens: tuple[int, ...] = (128,)
    output_len: int = 128  # steps that are timed
    batch_sizes: tuple[int, ...] = (1,)
    num_iters: int = 5
    num_iters_warmup: int = 2

    def ramp_len(self, batch_size: int, input_len: int, max_num_batched_tokens: int) -> int:
        """Tokens after which the last prompt of a batch is surely computed and nobody has ended: twice the
        steps that the prompts alone would take, since decodes share the budget.
        """
        return NUM_STEADY_STEPS + 2 * -(-batch_size * input_len // max_num_batched_tokens)

    def max_seq_len(self, max_num_batched_tokens: int) -> int:
        """Prompt and generated tokens of the longest sequence of any measurement."""
        batch, longest = max(self.batch_sizes), max(self.input_lens)
        return longest + self.output_len + self.ramp_len(batch, longest, max_num_batched_tokens)

    def check_batch_sizes(self, max_num_seqs: int) -> None:
        if max(self.batch_sizes) > max_num_seqs:
            raise ConfigError(
                f"batch_size is {max(self.batch_sizes)}; at most max_num_seqs, {max_num_seqs}, run together: "
                "raise --max-num-seqs"
            )


@dataclass(frozen=True)
class DecodeResult:
    batch_size: int
    input_len: int
    context_len: float  # mean over the timed steps
    step_s: Summary  # one measurement for each pair of calls
    floor_s: float
    floor_percent: float  # of the floor's rate that the median reaches
    itl_s: Summary  # every gap between increments of a request, pooled, from stream()


@dataclass(frozen=True)
class FirstTokenResult:
    input_len: int
    ttft_s: Summary  # from the call of stream() to its first increment, one request alone
    floor_s: float
    floor_percent: float


def run_decode(llm: LLM, workload: LatencyWorkload, floors: Floors) -> list[DecodeResult]:
    """Collective: every rank of the engine. Ranks other than 0 get times of their own, to be ignored."""
    return [
        _decode(llm, workload, floors, batch_size, input_len)
        for input_len in workload.input_lens
        for batch_size in workload.batch_sizes
    ]


def run_first_token(llm: LLM, workload: LatencyWorkload, floors: Floors) -> list[FirstTokenResult]:
    """Collective, as run_decode."""
    results = []
    for input_len in workload.input_lens:
        prompts = random_prompts(1, input_len, llm.spec.vocab_size)
        runs = range(workload.num_iters_warmup + workload.num_iters)
        times = [_first_token_s(llm, prompts) for _ in runs]
        ttft = summarize(times[workload.num_iters_warmup :])
        floor = floors.first_token_s(input_len)
        results.append(FirstTokenResult(input_len, ttft, floor, 100 * floor / ttft.median))
    return results


def random_prompts(count: int, length: int, vocab_size: int) -> Prompts:
    """The same ids in every run of every version."""
    rng = random.Random(0)
    return [rng.choices(range(vocab_size), k=length) for _ in range(count)]


def fixed_length(num_tokens: int) -> SamplingParams:
    """Greedy, exactly num_tokens, no text."""
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)


def _decode(
    llm: LLM, workload: LatencyWorkload, floors: Floors, batch_size: int, input_len: int
) -> DecodeResult:
    prompts = random_prompts(batch_size, input_len, llm.spec.vocab_size)
    ramp = workload.ramp_len(batch_size, input_len, llm.config.max_num_batched_tokens)
    runs = range(workload.num_iters_warmup + workload.num_iters)
    steps = [_step_s(llm, prompts, ramp, workload.output_len) for _ in runs]
    step = summarize(steps[workload.num_iters_warmup :])
    context_len = input_len + ramp + workload.output_len / 2
    floor = floors.decode_step_s(batch_size, context_len)
    gaps = replace(summarize(_token_gaps_s(llm, prompts, workload.output_len)), raw=[])  # too many to keep
    return DecodeResult(batch_size, input_len, context_len, step, floor, 100 * floor / step.median, gaps)


def _step_s(llm: LLM, prompts: Prompts, ramp: int, num_steps: int) -> float:
    """Host reads, plans and the last result are in both calls, so the difference holds steady steps alone."""
    return (generate_s(llm, prompts, ramp + num_steps) - generate_s(llm, prompts, ramp)) / num_steps


def generate_s(llm: LLM, prompts: Prompts, num_tokens: int) -> float:
    """Seconds of one generate() call. Collective."""
    start = time.perf_counter()
    llm.generate(prompts, fixed_length(num_tokens))
    return time.perf_counter() - start


def _first_token_s(llm: LLM, prompts: Prompts) -> float:
    start = time.perf_counter()
    times = [time.perf_counter() for _ in llm.stream(prompts, fixed_length(NUM_FIRST_TOKENS))]
    return (times[0] if times else time.perf_counter()) - start  # ranks other than 0 get no increments


def _token_gaps_s(llm: LLM, prompts: Prompts, num_tokens: int) -> list[float]:
    """At least one gap everywhere, so that every rank can summarise."""
    times: dict[str, list[float]] = defaultdict(list)
    for increment in llm.stream(prompts, fixed_length(num_tokens)):
        times[increment.request_id].append(time.perf_counter())
    gaps = [later - earlier for each in times.values() for earlier, later in pairwise(each)]
    return gaps or [0.0]
