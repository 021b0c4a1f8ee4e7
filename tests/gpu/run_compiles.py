"""In a process of its own: once an engine is there, no request waits until a kernel is compiled.

Prompts alone and many, short, odd and longer than any captured step, with every kind of sampling. Ends with 1
and the kernels' names if any is compiled.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton

from distllm import LLM, SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "intermediate_size": 1024, "max_position_embeddings": 6000, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
BATCHES = [[1], [7], [1500], [5000], [60] * 40, [100, 1, 33], [301] * 13, [1200, 900], [16] * 5 + [2048]]
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 1},
    {"top_k": 9, "top_p": 0.8, "min_p": 0.01, "n": 3},
    {"typical_p": 0.9, "repetition_penalty": 1.2},
    {"logprobs": 3, "prompt_logprobs": 2, "min_tokens": 4, "stop_token_ids": [7]},
]


def run(llm: LLM) -> None:
    for number, lengths in enumerate(BATCHES):
        prompts = [[5 + i % 50 for i in range(length)] for length in lengths]  # n-grams find what follows
        for kind in KINDS:
            llm.generate(prompts, SamplingParams(max_tokens=9 + number, ignore_eos=True, **kind))


def main() -> None:
    """Arguments: the method of speculation, or none."""
    late: list[str] = []
    speculation = {"method": sys.argv[1]} if sys.argv[1:] else None
    limits = {"max_num_seqs": 40, "max_num_batched_tokens": 4096, "kv_cache_memory_bytes": 2**28}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        with LLM(folder, load_format="dummy", speculative_config=speculation, **limits) as llm:
            triton.knobs.runtime.jit_post_compile_hook = lambda *, repr, **_: late.append(repr)
            run(llm)
    print("\n".join(late) or "nothing was compiled late", flush=True)
    sys.exit(bool(late))


if __name__ == "__main__":
    main()
