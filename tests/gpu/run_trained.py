"""On every rank: the demo model in bf16, eager and captured, sums by peer memory and by NCCL. FOLDER TP PP.

Every way must give the tokens of fp32 that are certain (TrainedCase), and twice the same tokens.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from distllm import LLM, SamplingParams
from tests.gpu.engine_cases import NUM_TOKENS, TrainedCase, load_trained_case


@contextmanager
def without_peer_memory() -> Iterator[None]:
    """Engines that are made in the block take sums by NCCL alone."""
    from distllm.comm.nccl import NcclComm

    make = NcclComm._try_one_shot
    NcclComm._try_one_shot = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        NcclComm._try_one_shot = make  # type: ignore[method-assign]


WAYS = {"peer memory": nullcontext, "NCCL": without_peer_memory}


def check(llm: LLM, case: TrainedCase, what: str) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    seeded = SamplingParams(temperature=0.8, seed=3, max_tokens=NUM_TOKENS, ignore_eos=True)
    runs = [
        [list(output.outputs[0].token_ids) for output in llm.generate(case.prompts, params)]
        for params in (greedy, greedy, seeded, seeded)
    ]
    if not llm.is_root:
        return
    for number, (found, certain) in enumerate(zip(runs[0], case.certain, strict=True)):
        assert found[: len(certain)] == certain, f"{what}: prompt {number} goes on otherwise"
    assert runs[0] == runs[1] and runs[2] == runs[3], f"{what}: the same call gave other tokens"


def main() -> None:
    folder, tp, pp = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    case = load_trained_case(folder)
    for eager, way in itertools.product((True, False), [*WAYS][: min(tp, 2)]):
        with (
            WAYS[way](),
            LLM(
                "demo",
                tensor_parallel_size=tp,
                pipeline_parallel_size=pp,
                dtype="bfloat16",
                enforce_eager=eager,
                enable_prefix_caching=False,  # twice the same steps
                kv_cache_memory_bytes=2**26,
            ) as llm,
        ):
            check(llm, case, f"eager {eager}, {way}")
    if llm.is_root:
        print(f"tp {tp} pp {pp} on {llm.device.type} passed", flush=True)


if __name__ == "__main__":
    main()
