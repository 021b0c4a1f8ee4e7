"""What generate(), stream() and beam_search() return. Field names as in vLLM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """One token's log-probability under the model's own distribution (before temperature and truncation)."""

    logprob: float
    rank: int | None = None  # 1 is the most likely
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One of the n continuations of a prompt."""

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None  # one dict for each token of token_ids
    finish_reason: str | None = None  # "stop", "length", "abort", "error"; None while running
    stop_reason: int | str | None = None  # the stop token id or string, or the error; None for eos
    num_draft_tokens: int = 0  # guessed by speculation, in all so far
    num_accepted_tokens: int = 0  # of these, the right ones

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A prompt and its continuations. From stream(), text and token_ids are the increments since the last
    one.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0  # prompt tokens that were not computed again
    # Where asked for, one dict for each token of the prompt; None for the first, which follows none.
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass(frozen=True)
class ScoreOutput:
    """How likely a text is under the model."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    logprobs: list[float]  # of each token but the first, given those before it
    is_greedy: list[bool]  # whether it is the likeliest

    @property
    def logprob(self) -> float:
        """Of the whole text, given its first token."""
        return math.fsum(self.logprobs)


def score_output(output: RequestOutput) -> ScoreOutput:
    """Of a request that asked for prompt_logprobs."""
    assert output.prompt_logprobs is not None, "nobody asked for them"
    chosen = [
        entries[token_id]
        for token_id, entries in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        if entries is not None
    ]
    logprobs, is_greedy = [each.logprob for each in chosen], [each.rank == 1 for each in chosen]
    return ScoreOutput(output.request_id, output.prompt, output.prompt_token_ids, logprobs, is_greedy)


@dataclass
class BeamSearchSequence:
    """One of the sequences that a beam search has found."""

    tokens: list[int]  # the prompt, then what was generated, the end-of-sequence token included
    cum_logprob: float  # of what was generated
    text: str  # of all tokens but special ones
    score: float  # (cum_logprob - diversity penalties) / generated tokens ** length_penalty
    finish_reason: str  # "stop" or "length"


@dataclass
class BeamSearchOutput:
    """What beam_search() returns for one prompt."""

    sequences: list[BeamSearchSequence]  # the best first
