"""A proposer for tests: it knows what comes, and lies as often as it is told to."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence


def informed(
    texts: Sequence[list[int]], chance: float, vocab_size: int
) -> Callable[[list[int], int], list[int]]:
    """texts: prompts with what will follow. Each guessed token is right with this chance."""
    rng = random.Random(0)

    def propose(token_ids: list[int], count: int) -> list[int]:
        found = [text for text in texts if text[: len(token_ids)] == token_ids]
        right = rng.choice(found)[len(token_ids) :][:count] if found else [5] * count
        return [token if rng.random() < chance else rng.randrange(vocab_size) for token in right]

    return propose
