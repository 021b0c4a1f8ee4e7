"""Request: one sequence being generated, with everything the scheduler knows of it. Plain Python on rank 0.

A prompt with n > 1 becomes n Requests; the others fork from the first. Knows no text and no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from sys import maxsize
from typing import TYPE_CHECKING

from distllm.runtime.plan import RowInit, RowSampling

if TYPE_CHECKING:
    from distllm.runtime.beams.beam_rows import BeamRows
    from distllm.runtime.speculation.drafting import Drafting
    from distllm.runtime.structured.constraint import Constraint

NEVER = maxsize  # as a ready_step


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(eq=False, slots=True, weakref_slot=True)
class Request:
    """token_ids grows by results only; what is planned but not yet known is counted in num_pending.

    token_ids:   |<-- prompt -->|<-- generated, known -->| num_pending sampled, not yet known |
                 |<-- num_computed_tokens (planned) -->|
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int  # generated tokens at most; prompt + max_tokens ≤ max_model_len was checked
    sampling: RowSampling
    stop_token_ids: frozenset[int] = frozenset()  # end generation when sampled (eos included unless ignored)
    priority: int = 0  # smaller runs first
    fork_from: Request | None = None  # share this one's prompt blocks once they are computed
    index: int = 0  # among the n samples of one prompt
    group: BeamRows | None = None  # the beam search that it is a row of
    constraint: Constraint | None = None  # of a structured output: which tokens may come next
    num_tokens_in_mask: int = 0  # output tokens that the constraint has taken
    drafting: Drafting | None = None  # None: it does not speculate

    status: RequestStatus = RequestStatus.WAITING
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"
    stop_reason: int | str | None = None  # the stop string or the error that ended it
    token_ids: list[int] = field(default_factory=list)  # prompt, then generated
    num_computed_tokens: int = 0  # planned: KV written by the end of the last planned step
    num_pending: int = (
        0  # sampled in planned steps whose results have not come, drafts verified there included
    )
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache or a fork, at first admission
    slot: int = -1
    block_ids: list[int] = field(default_factory=list)
    capacity: int = 0  # tokens that block_ids have room for
    block_digests: list[bytes] = field(
        default_factory=list
    )  # of the full blocks of token_ids, as far as hashed
    num_registered_blocks: int = 0  # leading block_ids that the prefix cache knows
    ready_step: int = (
        0  # first step in which the newest sampled token is on the first stage; of a constraint, known
    )
    arrival: int = -1  # set by the scheduler: order of add()
    max_total_tokens: int = field(init=False)  # prompt and generated

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.max_total_tokens = len(self.prompt_token_ids) + self.max_tokens

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_token_ids) :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def row_init(self) -> RowInit:
        """What the ranks are told where it enters its slot."""
        num_prompt, num_computed = self.num_prompt_tokens, self.num_computed_tokens
        return RowInit(self.slot, tuple(self.token_ids), num_prompt, num_computed, self.sampling)

    @property
    def is_known(self) -> bool:
        """Nothing of it is on its way: neither tokens nor the mask behind them."""
        in_mask = self.constraint is None or self.num_tokens_in_mask == self.num_output_tokens
        return in_mask and not self.num_pending

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of its prompt were asked for."""
        return self.sampling.num_prompt_logprobs >= 0

    def num_scored(self, start: int, num_tokens: int) -> int:
        """How many of the tokens from start on are followed by one of the prompt, which they score."""
        return max(0, min(num_tokens, self.num_prompt_tokens - 1 - start)) if self.scores_prompt else 0

    @property
    def num_planned_tokens(self) -> int:
        """Tokens that exist, known or pending."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose KV is not planned yet; 1 while decoding."""
        return self.num_planned_tokens - self.num_computed_tokens

    @property
    def wants_tokens(self) -> bool:
        """Whether one more sampled token could be kept: finish by length is foreseen by counting."""
        return self.num_planned_tokens < self.max_total_tokens

    @property
    def together(self) -> Sequence[Request]:
        """Those that are admitted, preempted and ended with it, itself included; their orders are
        neighbours."""
        return (self,) if self.group is None else self.group.requests

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: priority, then arrival. Unique among the requests of one scheduler."""
        return self.priority, self.arrival
