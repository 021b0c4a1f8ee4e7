"""On every rank: 100,000 draws in each way of tests/draw_cases.py, into a file of the folder. FOLDER TP."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from distllm import LLM
from tests.draw_cases import WAYS, draws_file, params, prompts


def main() -> None:
    folder, tp = Path(sys.argv[1]), int(sys.argv[2])
    with LLM(
        str(folder), tensor_parallel_size=tp, max_num_seqs=1000, kv_cache_memory_bytes=2**27, block_size=16
    ) as llm:
        outputs = {way: llm.generate(prompts(), params(way)) for way in WAYS}
    if llm.is_root:
        draws = {way: [list(each.outputs[0].token_ids) for each in outputs[way]] for way in WAYS}
        np.savez(draws_file(folder, tp), **{way: np.array(draws[way]) for way in WAYS})
        print(f"tp {tp} on {llm.device.type} drew", flush=True)


main()
