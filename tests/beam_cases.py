"""Beam searches that are asked of transformers: what, and what it finds."""

from __future__ import annotations

import random
from typing import Any

import torch

from distllm import BeamSearchParams

Case = tuple[list[int], BeamSearchParams]
Found = list[tuple[list[int], float]]  # tokens and score, the best first


def cases(count: int, seed: int, vocab_size: int) -> list[Case]:
    """Prompts of many lengths, some with a common beginning; every mode comes with every kind of penalty."""
    rng = random.Random(seed)
    shared = rng.choices(range(3, vocab_size), k=12)
    found = []
    for number in range(count):
        prompt = shared[: 6 * (number % 3)] + rng.choices(range(3, vocab_size), k=rng.randrange(1, 20))
        params = BeamSearchParams(
            beam_width=1 + number % 8,
            max_tokens=rng.randrange(1, 24),
            length_penalty=[1.0, -0.3, 0.0, 2.0, -1.5][number % 5],
            early_stopping=([False, True, "never"][number % 3]),  # type: ignore[arg-type]
            ignore_eos=number % 7 == 6,
        )
        found.append((prompt, params))
    return found


def reference(model: Any, case: Case) -> Found:
    prompt, params = case
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=params.beam_width,
        num_return_sequences=params.n or params.beam_width,
        do_sample=False,
        max_new_tokens=params.max_tokens,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        eos_token_id=None if params.ignore_eos else model.generation_config.eos_token_id,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    if params.beam_width == 1:  # transformers searches greedily, and gives no score
        return [(out.sequences[0].tolist(), 0.0)]
    ends = (len(prompt) + (out.beam_indices >= 0).sum(1)).tolist()  # beyond is padding
    sequences = [tokens[:end] for tokens, end in zip(out.sequences.tolist(), ends, strict=True)]
    return list(zip(sequences, out.sequences_scores.tolist(), strict=True))
