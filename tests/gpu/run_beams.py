"""On every rank: beam searches of many widths in fp32, eager and captured, against BeamCase. FOLDER TP PP."""

from __future__ import annotations

import sys
from pathlib import Path

from distllm import LLM, BeamSearchParams
from tests.gpu.engine_cases import BeamCase, load_beam_case


def check_beams(llm: LLM, case: BeamCase) -> None:
    outputs = llm.beam_search(case.prompts, [BeamSearchParams(**params) for params in case.params])
    if not llm.is_root:
        return
    found = [[sequence.tokens for sequence in output.sequences] for output in outputs]
    for number, (mine, wanted) in enumerate(zip(found, case.sequences, strict=True)):
        assert mine == wanted, f"search {number}: {case.params[number]}"


def main() -> None:
    folder, tp, pp = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    case = load_beam_case(folder)
    for eager, budget in ((True, 64), (False, 64), (False, 4096)):
        with LLM(
            str(folder),
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            enforce_eager=eager,
            max_num_batched_tokens=budget,
            block_size=16,
            max_num_seqs=40,  # some searches wait
            kv_cache_memory_bytes=2**26,
        ) as llm:
            check_beams(llm, case)
    if llm.is_root:
        print(f"tp {tp} pp {pp} on {llm.device.type} passed", flush=True)


if __name__ == "__main__":
    main()
