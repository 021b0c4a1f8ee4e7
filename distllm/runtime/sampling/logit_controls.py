"""LogitControls: what one request changes in its logits before a token is chosen. Plain data, sent in plans.

The order is vLLM's: what is allowed, bad words, repeated n-grams, bias, penalties, the user's own processors.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LogitControls:
    allowed_token_ids: tuple[int, ...] = ()  # nothing else may be sampled; (): anything
    bad_words: tuple[tuple[int, ...], ...] = ()  # may not be completed; each has a token or more
    no_repeat_ngram_size: int = 0  # no n-gram twice, the prompt included; 0: any
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added)
    repetition_penalty: float = 1.0  # of tokens in prompt or output: logits move away from 0 to below
    presence_penalty: float = 0.0  # subtracted from tokens of the output
    frequency_penalty: float = 0.0  # subtracted for each time in the output
    processors: tuple[int, ...] = ()  # numbers of the LLM's logits_processors, in order

    @property
    def has_penalty(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


NO_CONTROLS = LogitControls()
