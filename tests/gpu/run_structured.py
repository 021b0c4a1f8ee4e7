"""On every rank: structured outputs beside plain ones in fp32, eager and captured, the same tokens. FOLDER TP
PP."""

from __future__ import annotations

import sys

from distllm import LLM, SamplingParams
from tests.structured_cases import cases, check_text

COUNT, MAX_TOKENS = 60, 600


def run(llm: LLM) -> list[list[int]]:
    forms, asked = list(cases(COUNT)), []
    for seed, form in enumerate(forms):
        asked.append(SamplingParams(structured_outputs=form, seed=seed, max_tokens=MAX_TOKENS))
        asked.append(SamplingParams(max_tokens=1 + seed, seed=seed, ignore_eos=True))
    outputs = llm.generate([[5 + i % 90] * (1 + i % 7) for i in range(len(asked))], asked)
    for form, output in zip(forms, outputs[::2], strict=False):
        assert output.outputs[0].finish_reason == "stop", (form, output)
        check_text(form, output.outputs[0].text)
    return [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    folder, tp, pp = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    found = []
    for eager in (True, False):
        with LLM(
            folder,
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            enforce_eager=eager,
            max_num_seqs=40,
            kv_cache_memory_bytes=2**26,
        ) as llm:
            found.append(run(llm))
    if llm.is_root:
        assert len(found[0]) == 2 * COUNT and found[0] == found[1]
        print(f"tp {tp} pp {pp} on {llm.device.type} passed", flush=True)


if __name__ == "__main__":
    main()
