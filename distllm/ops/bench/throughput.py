"""`bench throughput`: requests and tokens per second of generate(), all prompts at once, beside the ceiling.

All time counts, the ramp and the tail included. Every rank runs this; rank 0's times count.
"""

from __future__ import annotations

from dataclasses import dataclass

from distllm.ops.bench.floors import Floors
from distllm.ops.bench.latency import generate_s, random_prompts
from distllm.ops.bench.timing import Summary, summarize
from distllm.runtime.llm import LLM

NUM_WARMUP_TOKENS = 8


@dataclass(frozen=True)
class ThroughputWorkload:
    num_prompts: int = 256
    input_len: int = 512
    output_len: int = 256
    num_iters: int = 3

    @property
    def max_seq_len(self) -> int:
        return self.input_len + self.output_len


@dataclass(frozen=True)
class ThroughputResult:
    """Rates are those of the median run."""

    num_prompts: int
    input_len: int
    output_len: int
    elapsed_s: Summary
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float  # prompt tokens too
    ceiling_output_tokens_per_s: float
    ceiling_percent: float


def run_throughput(llm: LLM, workload: ThroughputWorkload, floors: Floors) -> ThroughputResult:
    """Collective: every rank of the engine. Ranks other than 0 get times of their own, to be ignored."""
    prompts = random_prompts(workload.num_prompts, workload.input_len, llm.spec.vocab_size)
    running = min(workload.num_prompts, llm.config.max_num_seqs)
    generate_s(llm, prompts[:running], min(NUM_WARMUP_TOKENS, workload.output_len))
    elapsed = summarize([generate_s(llm, prompts, workload.output_len) for _ in range(workload.num_iters)])
    requests_per_s = workload.num_prompts / elapsed.median
    output_rate = requests_per_s * workload.output_len
    ceiling = floors.output_tokens_per_s(running, workload.input_len, workload.output_len)
    return ThroughputResult(
        num_prompts=workload.num_prompts,
        input_len=workload.input_len,
        output_len=workload.output_len,
        elapsed_s=elapsed,
        requests_per_s=requests_per_s,
        output_tokens_per_s=output_rate,
        total_tokens_per_s=requests_per_s * workload.max_seq_len,
        ceiling_output_tokens_per_s=ceiling,
        ceiling_percent=100 * output_rate / ceiling,
    )
