"""On every rank: logits processors in fp32, eager and captured. One that fails ends its request alone, all
else is Case's tokens. FOLDER TP PP."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch

from distllm import LLM, SamplingParams
from distllm.runtime.sampling.logits_processors import LogitsProcessor
from tests.gpu.engine_cases import GREEDY, Case, load_case

NUM_SAID = 6  # tokens of an output when the processor fails


def processors(case: Case) -> dict[str, LogitsProcessor]:
    def fails(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        if token_ids[:-NUM_SAID] in case.prompts:
            raise LookupError("as it was asked to")
        return logits

    return {"doubles": lambda token_ids, logits: 2 * logits, "fails": fails}


def check(llm: LLM, case: Case) -> None:
    """Every prompt, in turns without processors, with one that changes no order, with one that fails."""
    names = itertools.cycle([None, ["doubles"], ["doubles", "fails"]])
    params = [SamplingParams(**GREEDY, logits_processors=next(names)) for _ in case.prompts]
    outputs = llm.generate(case.prompts, params)
    if not llm.is_root:
        return
    for asked, output, greedy in zip(params, outputs, case.greedy, strict=True):
        found, fails = output.outputs[0], "fails" in (asked.logits_processors or [])
        assert list(found.token_ids) == (greedy[:NUM_SAID] if fails else greedy), found
        assert found.finish_reason == ("error" if fails else "length"), found
        if fails:
            assert "'fails' raised LookupError in run_processors.py" in str(found.stop_reason), found


def main() -> None:
    folder, tp, pp = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    case = load_case(folder)
    for eager in (True, False):
        with LLM(
            str(folder),
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            enforce_eager=eager,
            max_num_batched_tokens=64,
            max_num_seqs=27,
            kv_cache_memory_bytes=2**26,
            logits_processors=processors(case),
        ) as llm:
            check(llm, case)
    if llm.is_root:
        print(f"tp {tp} pp {pp} on {llm.device.type} passed", flush=True)


if __name__ == "__main__":
    main()
