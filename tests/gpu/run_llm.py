"""On every rank: the engine on GPUs, eager and captured, against the expected tokens. FOLDER TP PP."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from distllm import LLM, SamplingParams
from tests.gpu.engine_cases import GREEDY, SEEDED, options


def run(folder: Path, tp: int, pp: int, eager: bool) -> tuple[list[Any], bool]:
    case = json.loads((folder / "case.json").read_text())
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    with LLM(str(folder), enforce_eager=eager, **sizes, **options()) as llm:
        assert llm.device.type == "cuda"
        prompts = case["prompts"]
        greedy = llm.generate(prompts, SamplingParams(**GREEDY))
        alone = llm.generate(prompts[5], SamplingParams(**SEEDED))
        mixed = [SamplingParams(**GREEDY)] * len(prompts)
        mixed[5] = SamplingParams(**SEEDED)
        among = llm.generate(prompts, mixed)
        if not llm.is_root:
            return [], False
        assert [list(o.outputs[0].token_ids) for o in greedy] == case["expected"], "greedy tokens differ"
        assert alone[0].outputs[0].token_ids == among[5].outputs[0].token_ids, "the batch changed a sample"
        return list(alone[0].outputs[0].token_ids), True


def main() -> None:
    folder, tp, pp = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    eager, _ = run(folder, tp, pp, eager=True)
    captured, is_root = run(folder, tp, pp, eager=False)
    assert eager == captured, "graphs changed a sample"
    if is_root:
        print(f"tp {tp} pp {pp} passed", flush=True)


if __name__ == "__main__":
    main()
