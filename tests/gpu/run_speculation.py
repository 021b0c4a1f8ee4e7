"""On every rank: speculation in fp32, eager and captured, against Case's tokens. FOLDER TP PP."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

from distllm import LLM, SamplingParams
from distllm.runtime.speculation.switch import SpeculationSwitch
from tests.gpu.engine_cases import GREEDY, NUM_TOKENS, SEEDED, Case, load_case
from tests.speculation_cases import informed

VOCAB_SIZE, NUM_DRAFTS = 1031, 4


def check(llm: LLM, case: Case, least_right: float) -> None:
    """All greedy prompts and the sampled ones together, then the first prompts one by one."""
    names = list(SEEDED)
    prompts = [*case.prompts, *[case.needle] * len(names)]
    params = [SamplingParams(**GREEDY)] * len(case.prompts) + [SamplingParams(**SEEDED[n]) for n in names]
    wanted = [*case.greedy, *(case.seeded[name] for name in names)]
    outputs = llm.generate(prompts, params)
    alone = [llm.generate(prompt, SamplingParams(**GREEDY)) for prompt in case.prompts[:3]]
    stats = llm.speculation_stats()
    if stats is None:  # not on rank 0
        return
    assert [list(output.outputs[0].token_ids) for output in outputs] == wanted, "tokens differ"
    assert [list(each[0].outputs[0].token_ids) for each in alone] == case.greedy[:3], "one alone differs"
    assert stats.num_draft_tokens > 3 * NUM_TOKENS, "nothing was guessed"
    assert stats.acceptance_rate > least_right, f"{stats.acceptance_rate:.0%} of the guesses were right"


def main() -> None:
    folder, tp, pp = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    case = load_case(folder)
    SpeculationSwitch.decide = lambda self, num_rows: True  # type: ignore[method-assign]  # however slow
    texts = [[*prompt, *tokens] for prompt, tokens in zip(case.prompts, case.greedy, strict=True)]
    guess = informed(texts, 0.8, VOCAB_SIZE)
    ways: list[tuple[dict[str, Any], float]] = [
        ({"method": "custom", "proposer": guess}, 0.5),
        ({"method": "draft_model", "model": str(folder)}, 0.9),
    ]
    if tp > 1:
        ways.append(({**ways[1][0], "draft_tensor_parallel_size": tp}, 0.9))
    for eager, (config, least_right) in itertools.product((True, False), ways):
        with LLM(
            str(folder),
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            enforce_eager=eager,
            max_num_batched_tokens=64,
            max_num_seqs=27,
            kv_cache_memory_bytes=2**26,
            speculative_config={**config, "num_speculative_tokens": NUM_DRAFTS},
        ) as llm:
            check(llm, case, least_right)
    if llm.is_root:
        print(f"tp {tp} pp {pp} on {llm.device.type} passed", flush=True)


if __name__ == "__main__":
    main()
