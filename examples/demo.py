"""Four ranks tell a fairy tale, tensor parallel 2 × pipeline parallel 2, and one rank checks what they wrote.

launch/mpirun.sh -n 4 python examples/demo.py

Every rank runs this file from top to bottom; results are on rank 0.
"""

from __future__ import annotations

import sys
import time

from distllm import LLM, SamplingParams
from distllm.comm.local import LocalControl

TALE = "Once upon a time there was a poor miller who had"
OPENINGS = ["There was once a king who", "In the forest", "The youngest brother", "A fox met a"]
SAMPLED = SamplingParams(temperature=0.7, top_p=0.95, seed=7, max_tokens=200)
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)


def tell(llm: LLM) -> float:
    """Stream one tale to the terminal; return tokens per second. Collective."""
    if llm.is_root:
        print(TALE, end="", flush=True)
    start, num_tokens = time.perf_counter(), 0
    for increment in llm.stream(TALE, SAMPLED):
        num_tokens += len(increment.outputs[0].token_ids)
        print(increment.outputs[0].text, end="", flush=True)
    return num_tokens / (time.perf_counter() - start)


def greedy_ids(llm: LLM) -> list[list[int]]:
    """What each opening is continued with, as token ids. Collective; empty on ranks other than 0."""
    return [list(output.outputs[0].token_ids) for output in llm.generate(OPENINGS, GREEDY)]


def main() -> None:
    with LLM("demo", tensor_parallel_size=2, pipeline_parallel_size=2) as llm:
        tokens_per_s = tell(llm)
        from_four = greedy_ids(llm)
    if not llm.is_root:
        return
    print(f"\n\n{tokens_per_s:.0f} tokens/s from {llm.layout.equation}", flush=True)
    with LLM("demo", comm=LocalControl()) as alone:
        from_one = greedy_ids(alone)
    if from_four != from_one:
        sys.exit(f"greedy output differs\n  4 ranks: {from_four}\n  1 rank:  {from_one}")
    num_tokens = sum(map(len, from_four))
    print(f"1-rank greedy output is identical ({len(OPENINGS)} prompts, {num_tokens} tokens)")


if __name__ == "__main__":
    main()
