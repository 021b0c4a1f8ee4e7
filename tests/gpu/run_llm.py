"""On every rank: the engine in fp32, eager and captured, chunked and whole, against Case. FOLDER TP PP."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from distllm import LLM, RequestOutput, SamplingParams
from tests.gpu.engine_cases import GREEDY, SEEDED, Case, load_case

CHUNKED, WHOLE = 64, 4096  # max_num_batched_tokens; the longest prompts have about 100
AT = 13  # where the sampled prompt stands among the others


def tokens(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def check_greedy(llm: LLM, case: Case) -> None:
    outputs = llm.generate(case.prompts, SamplingParams(**GREEDY))
    if llm.is_root:
        assert tokens(outputs) == case.greedy, "greedy tokens differ"


def check_seeded(llm: LLM, case: Case, name: str) -> None:
    """Alone, once more from the prefix cache, and among 31 others: what transformers' logits give."""
    seeded, greedy = SamplingParams(**SEEDED[name]), SamplingParams(**GREEDY)
    wanted = case.seeded[name]
    alone = [llm.generate(case.needle, seeded) for _ in range(2)]
    prompts = [*case.prompts[:AT], case.needle, *case.prompts[AT:]]
    among = llm.generate(prompts, [seeded if i == AT else greedy for i in range(len(prompts))])
    if not llm.is_root:
        return
    assert alone[1][0].num_cached_tokens >= 64, "the prefix cache was not hit"
    assert [tokens(outputs) for outputs in alone] == [[wanted]] * 2, f"{name}, alone"
    assert tokens(among)[AT] == wanted, f"{name}: the batch changed a sample"
    assert tokens(among)[:AT] + tokens(among)[AT + 1 :] == case.greedy, (
        f"{name}: the batch changed greedy tokens"
    )


def main() -> None:
    folder, tp, pp = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    case = load_case(folder)
    # Blocks of 64 tokens hold whole tiles of prefill attention, smaller ones take its other way.
    for eager, (budget, block_size) in itertools.product((True, False), ((CHUNKED, 16), (WHOLE, 64))):
        with LLM(
            str(folder),
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            enforce_eager=eager,
            max_num_batched_tokens=budget,
            block_size=block_size,
            max_num_seqs=27,  # of 32: some wait, and no captured size fits them all
            kv_cache_memory_bytes=2**26,
        ) as llm:
            check_greedy(llm, case)
            for name in SEEDED:
                check_seeded(llm, case, name)
    if llm.is_root:
        print(f"tp {tp} pp {pp} on {llm.device.type} passed", flush=True)


if __name__ == "__main__":
    main()
