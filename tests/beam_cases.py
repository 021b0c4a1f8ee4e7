"""Beam searches that are asked of transformers: what, and what it finds. Groups of beams, which it no longer
knows, are asked of a search that is written down here: plain, slow, over the whole vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from distllm import BeamSearchParams

Case = tuple[list[int], BeamSearchParams]
Found = list[tuple[list[int], float]]  # tokens and score, the best first
NextLogprobs = Callable[[list[list[int]]], np.ndarray]  # of token lists of one length, [lists, vocabulary]


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


def in_groups(batch: list[Case]) -> list[Case]:
    """The same searches, those of several beams in every possible number of groups."""
    found = []
    for number, (prompt, params) in enumerate(batch):
        counts = [n for n in range(2, params.beam_width + 1) if params.beam_width % n == 0]
        if counts:
            count, penalty = counts[number // 8 % len(counts)], [0.5, 0.1, 1.7, 30.0, 0.0][number // 3 % 5]
            params = replace(params, num_beam_groups=count, diversity_penalty=penalty)
        found.append((prompt, params))
    return found


def reference(model: Any, case: Case) -> Found:
    if case[1].num_beam_groups > 1:
        return diverse_reference(logprobs_of(model), case, model.generation_config.eos_token_id)
    return transformers_reference(model, case)


def logprobs_of(model: Any) -> NextLogprobs:
    @torch.no_grad()
    def logprobs(rows: list[list[int]]) -> np.ndarray:
        return model(torch.tensor(rows)).logits[:, -1].log_softmax(-1).double().numpy()  # type: ignore[no-any-return]

    return logprobs


def diverse_reference(logprobs: NextLogprobs, case: Case, eos_token_ids: int | Collection[int]) -> Found:
    """Group beam search as transformers 4 had it; when a group ends is decided as transformers 5 does."""
    prompt, params = case
    size = params.beam_width // params.num_beam_groups
    eos = set(np.atleast_1d(eos_token_ids).tolist() if not params.ignore_eos else [])
    running: list[Found] = [[([], 0.0)] for _ in range(params.num_beam_groups)]
    ended: list[Found] = [[] for _ in running]
    open_groups = set(range(params.num_beam_groups))
    for length in range(1, params.max_tokens + 1):
        taken: list[int] = []  # in this step, by the groups before
        for group in sorted(open_groups):
            scores = logprobs([prompt + tokens for tokens, _ in running[group]])
            scores = scores - params.diversity_penalty * np.bincount(taken, minlength=scores.shape[1])
            both = zip(running[group], scores.tolist(), strict=True)
            all_next = [([*tokens, i], cum + s) for (tokens, cum), row in both for i, s in enumerate(row)]
            all_next.sort(key=lambda found: -found[1])
            running[group] = [found for found in all_next if found[0][-1] not in eos][:size]
            taken += [tokens[-1] for tokens, _ in running[group]]
            done = [found for found in all_next[:size] if found[0][-1] in eos]
            done += running[group] if length == params.max_tokens else []
            ended[group] += [(tokens, cum / length**params.length_penalty) for tokens, cum in done]
            ended[group] = sorted(ended[group], key=lambda found: -found[1])[:size]
            if len(ended[group]) == size:
                goes_far = params.early_stopping == "never" and params.length_penalty > 0
                end = params.max_tokens if goes_far else length
                at_best = running[group][0][1] / end**params.length_penalty
                if params.early_stopping is True or at_best <= ended[group][-1][1]:
                    open_groups.remove(group)
    best = sorted((found for group in ended for found in group), key=lambda found: -found[1])
    return [(prompt + tokens, score) for tokens, score in best[: params.n or params.beam_width]]


def transformers_reference(model: Any, case: Case) -> Found:
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
