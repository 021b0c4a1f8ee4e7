"""StepPlan: what one step does, decided once on rank 0 and sent to every rank as one int32 buffer.

A plan says what *changed*: rows that enter slots, blocks appended to tables, blocks to copy, and which slots
run. All else (lengths, tables, parameters, last tokens) already lives in the slot tables of every rank. Knows
no tensor, no rank and no request; plan_codec turns it into words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

from distllm.runtime.sampling.logit_controls import LogitControls


@dataclass(frozen=True)
class RowSampling:
    """The sampling parameters of one slot, as the device tables hold them."""

    temperature: float = 0.0  # 0 means greedy
    top_k: int = 0  # 0 means all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # signed 64-bit, the key of this row's random numbers
    num_logprobs: int = -1  # -1 none, 0 the sampled token's alone, k also the k best
    min_tokens: int = 0  # until so many are generated, stop_token_ids cannot be sampled
    stop_token_ids: tuple[int, ...] = ()
    typical_p: float = 1.0  # 1 keeps all
    num_prompt_logprobs: int = -1  # as num_logprobs, of the prompt's own tokens
    controls: LogitControls | None = None

    @property
    def truncates(self) -> bool:
        """By a border on the logits."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def is_processed(self) -> bool:
        """By a user's own processors, which may fail."""
        return self.controls is not None and bool(self.controls.processors)

    @property
    def is_plain(self) -> bool:
        """Greedy or tempered, and nothing more: what a captured step can sample."""
        changed = self.truncates or self.typical_p < 1 or self.controls is not None
        return not changed and self.num_logprobs < 0 and self.min_tokens == 0


@dataclass(frozen=True)
class RowInit:
    """A request enters a slot: whatever the slot held before is gone."""

    slot: int
    token_ids: tuple[int, ...]  # prompt, and what was generated
    num_prompt_tokens: int
    num_computed_tokens: int  # tokens whose KV is already in the blocks (prefix cache, fork)
    sampling: RowSampling


@dataclass(frozen=True)
class RowUpdate:
    """A row goes on otherwise than the device knows: a beam from another one's tokens, a speculation from
    drafts or from what was kept of them. Tokens before start and parameters stay."""

    slot: int
    start: int
    token_ids: tuple[int, ...]  # from position start on
    num_computed_tokens: int


@dataclass(frozen=True)
class BlockUpdate:
    """block_table[slot, start : start + len(block_ids)] = block_ids."""

    slot: int
    start: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True)
class PrefillRow:
    """num_tokens of one slot run in this step, from its num_computed_tokens on. samples: the logits of the
    last one give the next token."""

    slot: int
    num_tokens: int
    samples: bool
    num_scored: int = 0  # the first so many tokens give log-probabilities of those behind them, the prompt's
    num_drafts: int = 0  # the last so many are guesses: they, and the token before them, all sample

    @property
    def num_sampled(self) -> int:
        return 1 + self.num_drafts if self.samples else 0


@dataclass
class StepPlan:
    """One step. Applied in this order: new_rows, row_updates and block_updates, block_copies, then the rows
    run together: in each layer every row's KV is written before any row reads, so that a row may share blocks
    that another row fills in the same step.

    Batch order: decode_slots, then prefills. Without either there is no forward pass; the step exists so that
    results of earlier steps reach rank 0.
    """

    step: int
    decode_slots: list[int] = field(default_factory=list)  # ascending; one token each, and all sample
    prefills: list[PrefillRow] = field(default_factory=list)  # in scheduling order
    new_rows: list[RowInit] = field(default_factory=list)
    row_updates: list[RowUpdate] = field(default_factory=list)
    block_updates: list[BlockUpdate] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)  # (src, dst) block ids
    # slot → which tokens it may sample in this step, where a grammar says so: one bit for each token id, the
    # lowest first, in whole int32 words. A mask for each token that the slot samples, one after another.
    token_masks: dict[int, bytes] = field(default_factory=dict)
    awaits_masks: bool = False  # more of them come in a message of their own, before anything is sampled

    @property
    def is_empty(self) -> bool:
        """Nothing runs and nothing changes: there is only to wait for results."""
        changes = self.new_rows or self.row_updates or self.block_updates or self.block_copies
        return not (self.num_rows or changes)

    @property
    def num_rows(self) -> int:
        return len(self.decode_slots) + len(self.prefills)

    @property
    def num_tokens(self) -> int:
        return len(self.decode_slots) + sum(row.num_tokens for row in self.prefills)

    @property
    def slots(self) -> list[int]:
        """The slot of each row, in batch order."""
        return self.decode_slots + [row.slot for row in self.prefills]

    @property
    def cu_seqlens(self) -> list[int]:
        """Row i is tokens cu_seqlens[i] : cu_seqlens[i + 1] of the batch."""
        num_decodes = len(self.decode_slots)
        ends = accumulate((row.num_tokens for row in self.prefills), initial=num_decodes)
        return [*range(num_decodes), *ends]

    @property
    def sampled_slots(self) -> list[int]:
        """The slot of each token that is sampled in this step, in batch order."""
        return self.decode_slots + [row.slot for row in self.prefills for _ in range(row.num_sampled)]

    @property
    def scored_rows(self) -> list[tuple[int, PrefillRow]]:
        """(where in the batch its tokens begin, the row) of those that score tokens of their prompt."""
        begins = accumulate((row.num_tokens for row in self.prefills), initial=len(self.decode_slots))
        return [(begin, row) for begin, row in zip(begins, self.prefills, strict=False) if row.num_scored]

    @property
    def sampled_places(self) -> list[tuple[int, int]]:
        """Where each of them is sampled: (row of the batch, how many tokens before that row's last)."""
        num_decodes = len(self.decode_slots)
        places = [(row, 0) for row in range(num_decodes)]
        for number, row in enumerate(self.prefills, num_decodes):
            places += [(number, back) for back in range(row.num_sampled - 1, -1, -1)]
        return places


def mask_bytes(vocab_size: int) -> int:
    """Of one mask in StepPlan.token_masks."""
    return 4 * -(-vocab_size // 32)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one sampled position, before temperature and truncation."""

    logprob: float  # of the sampled token
    rank: int  # 1 + number of tokens that are more likely
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]

    def limited(self, num_top: int) -> TokenLogprobs:
        """With the num_top best alone."""
        return TokenLogprobs(self.logprob, self.rank, self.top_ids[:num_top], self.top_logprobs[:num_top])


@dataclass(frozen=True)
class StepResult:
    """What came back to rank 0 from one step: one entry for each of plan.sampled_slots, in that order."""

    step: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None = None  # None when no row of the step asked
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # plan.scored_rows, one after another
    errors: dict[int, str] = field(default_factory=dict)  # entry → why its token does not count
