"""What the engine is asked on GPUs, with the answers of transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.checkpoints import greedy_reference, make_llama

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 77, "max_tokens": 24, "ignore_eos": True}


def options() -> dict[str, Any]:
    """Small enough that prompts are chunked and batches do not fill a captured size."""
    return {"max_num_seqs": 20, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 2**26}


def make_case(folder: Path) -> None:
    """A checkpoint with heads of a real size, prompts of odd lengths, and their greedy tokens in fp32."""
    model = make_llama(
        folder, hidden_size=256, head_dim=64, num_attention_heads=8, num_key_value_heads=4, vocab_size=1031
    )
    rng = random.Random(3)
    lengths = [1, 2, 15, 16, 17, 33, 100, *(rng.randrange(1, 60) for _ in range(16))]
    prompts = [[rng.randrange(3, 1031) for _ in range(length)] for length in lengths]
    expected = [greedy_reference(model, prompt, GREEDY["max_tokens"]) for prompt in prompts]
    (folder / "case.json").write_text(json.dumps({"prompts": prompts, "expected": expected}))
