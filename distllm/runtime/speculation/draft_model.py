"""DraftProposer: a small model guesses, several tokens of all requests together. Rank 0 only.

The draft model is a ModelRunner of its own that is given plans of its own: first what it has not computed
yet of each request, then one decode step for each further draft, which it feeds itself on the device. It
lies in the slots of the requests and in their KV blocks, whose ids mean another cache here. It samples with
the request's own parameters, seed and positions: the random numbers that the verification will draw, so that
both models agree as often as their distributions do. Knows no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from distllm.runtime.plan import BlockUpdate, PrefillRow, RowInit, RowUpdate, StepPlan, StepResult
from distllm.runtime.request import Request


@dataclass
class _Row:
    """What the draft model knows of a slot."""

    request: Request
    block_ids: list[int] = field(default_factory=list)
    num_known: int = 0  # tokens, drafts left out
    drafts: list[int] = field(default_factory=list)  # the last guess: KV of all but its last token is there

    @property
    def num_right(self) -> int:
        """Tokens whose KV is there and right."""
        written = self.drafts[:-1]
        found = self.request.token_ids[self.num_known : self.num_known + len(written)]
        wrong = (i for i, (a, b) in enumerate(zip(found, written, strict=False)) if a != b)
        return self.num_known + next(wrong, len(found))


class DraftProposer:
    def __init__(
        self,
        run: Callable[[StepPlan], None],
        result: Callable[[int], StepResult],
        max_num_batched_tokens: int,
    ) -> None:
        """run, result: as ModelRunner's, of the draft model on all its ranks."""
        self._run, self._result = run, result
        self._max_tokens = max_num_batched_tokens
        self._rows: dict[int, _Row] = {}  # by slot
        self._step = 0

    def propose(self, wanted: Mapping[Request, int]) -> list[list[int]]:
        plans = self._compute_known(list(wanted))
        for number in range(1, max(wanted.values())):
            plans.append(self._new_plan())
            plans[-1].decode_slots = sorted(r.slot for r, count in wanted.items() if count > number)
            self._run(plans[-1])
        drafts: dict[int, list[int]] = {request.slot: [] for request in wanted}
        for plan in plans:
            for slot, token_id in zip(plan.sampled_slots, self._result(plan.step).token_ids, strict=True):
                drafts[slot].append(token_id)
        for request in wanted:
            self._rows[request.slot].drafts = drafts[request.slot]
        return [drafts[request.slot] for request in wanted]

    def _new_plan(self) -> StepPlan:
        plan = StepPlan(self._step)
        self._step += 1
        return plan

    def _compute_known(self, requests: Sequence[Request]) -> list[StepPlan]:
        """Run all tokens that are known and not computed, within the limit of a step; the last one of each
        request samples the first draft.
        """
        plans = [self._new_plan()]
        budget = self._max_tokens
        for request in requests:
            left = self._bring_up_to_date(plans[-1], request)
            while left:
                if budget == 0:
                    plans.append(self._new_plan())
                    budget = self._max_tokens
                count = min(left, budget)
                left, budget = left - count, budget - count
                plans[-1].prefills.append(PrefillRow(request.slot, count, samples=left == 0))
        for plan in plans:
            _split_decodes(plan)
            self._run(plan)
        return plans

    def _bring_up_to_date(self, plan: StepPlan, request: Request) -> int:
        """Write into the plan what is new of the request; return how many tokens are to be computed."""
        row = self._rows.get(request.slot)
        num_tokens = len(request.token_ids)
        if row is None or row.request is not request or not _begins_with(request.block_ids, row.block_ids):
            row = self._rows[request.slot] = _Row(request)
            # What the target took from its prefix cache is computed again: nobody knows whether this model
            # ever saw it. The values that are written are those that are there, if it did.
            num_right = 0
            sampling = replace(request.sampling, num_logprobs=-1, num_prompt_logprobs=-1)
            tokens = tuple(request.token_ids)
            plan.new_rows.append(RowInit(request.slot, tokens, request.num_prompt_tokens, 0, sampling))
        else:
            start, num_right = row.num_known, row.num_right
            plan.row_updates.append(
                RowUpdate(request.slot, start, tuple(request.token_ids[start:]), num_right)
            )
        new_blocks = request.block_ids[len(row.block_ids) :]
        if new_blocks:
            plan.block_updates.append(BlockUpdate(request.slot, len(row.block_ids), tuple(new_blocks)))
        row.block_ids += new_blocks
        row.num_known = num_tokens
        return num_tokens - num_right


def _split_decodes(plan: StepPlan) -> None:
    """Rows of one token that sample are decodes."""
    decodes = [row.slot for row in plan.prefills if row.samples and row.num_tokens == 1]
    plan.decode_slots = sorted(decodes)
    plan.prefills = [row for row in plan.prefills if row.slot not in set(decodes)]


def _begins_with(block_ids: list[int], known: list[int]) -> bool:
    return block_ids[: len(known)] == known
