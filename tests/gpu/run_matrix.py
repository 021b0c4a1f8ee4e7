"""On every rank: graphs beside every other feature of the DecodingMatrix, in fp32. FOLDER TP PP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from distllm import LLM
from tests import decoding_matrix as matrix


def plain_outputs(folder: Path, grid: dict[str, Any], pair: matrix.Pair) -> list[Any]:
    """Eager, one request at a time, under the same layout; the other scripts compare layouts."""
    with LLM(str(folder), **grid, **matrix.PLAIN) as llm:
        return matrix.run(llm, matrix.requests(pair), [[i] for i in range(matrix.NUM_PROMPTS)])


def main() -> None:
    folder, tp, pp = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    grid: dict[str, Any] = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    for pair in matrix.ON_GPU:
        need_tp, need_pp = matrix.layout(pair)
        if need_tp > tp or need_pp > pp:
            continue
        plain = plain_outputs(folder, grid, pair)
        with matrix.arranged(pair) as seen, LLM(str(folder), **grid, **matrix.options(folder, pair)) as llm:
            matrix.check_cell(llm, pair, plain, seen)
    if llm.is_root:
        print(f"tp {tp} pp {pp} on {llm.device.type} passed", flush=True)


if __name__ == "__main__":
    main()
