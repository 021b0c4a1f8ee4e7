"""Verification: speculation in the steps that the scheduler plans. Rank 0 only.

Gives drafts their blocks and their rows in a plan, counts of the results those that are right, and tells the
ranks where a draft was wrong. Whether and how much to speculate, Speculation says.
"""

from __future__ import annotations

from distllm.runtime.block_tables import BlockTables
from distllm.runtime.plan import PrefillRow, RowUpdate, StepPlan
from distllm.runtime.request import NEVER, Request, RequestStatus
from distllm.runtime.speculation.speculation import Speculation


class Verification:
    def __init__(self, speculation: Speculation, tables: BlockTables) -> None:
        self.speculation = speculation
        self._tables = tables
        self._rolled_back: dict[Request, int] = {}  # of these the ranks believe that more tokens are right

    def schedule(self, plan: StepPlan, requests: list[Request], budget: int) -> tuple[list[Request], int]:
        """Plan a row for each of the requests that gets drafts. Returns the others, which decode as ever, and
        what is left of the budget: it has the newest token of every request behind it, and no drafts.
        """
        wanted = self._wanted_drafts(plan, requests, budget)
        drafts = self.speculation.propose(wanted, plan.token_masks)
        for request, token_ids in drafts.items():
            self._verify(plan, request, token_ids)
        self._roll_back(plan)
        others = [request for request in requests if request not in drafts]
        return others, budget - sum(map(len, drafts.values()))

    def take(self, request: Request, step: int) -> bool:
        """Whether the next result of a request in verification counts. What is computed is counted again from
        the first draft on: KV behind a wrong one is worth nothing. step: the next to be planned.
        """
        drafting = request.drafting
        assert drafting is not None, "it is in verification"
        number = len(drafting.token_ids) - request.num_pending
        counts = drafting.takes(number, request.token_ids)
        if counts and request.status is RequestStatus.RUNNING:
            request.num_computed_tokens = drafting.start + number
        if request.num_pending == 0:
            if self.speculation.end(request):
                self._rolled_back[request] = request.num_computed_tokens
            if request.constraint is None:
                request.ready_step = step
        return counts

    def _wanted_drafts(self, plan: StepPlan, requests: list[Request], budget: int) -> dict[Request, int]:
        """How many each request can have; blocks are taken for them as far as some are free."""
        wanted: dict[Request, int] = {}
        for request in requests:
            end = len(request.token_ids) + min(budget, self.speculation.num_wanted(request))
            while request.capacity < end and self._tables.has_room(1):
                plan.block_updates.append(self._tables.append(request))
            count = min(end, request.capacity) - len(request.token_ids)
            if count > 0:
                wanted[request] = count
                budget -= count
        return wanted

    def _verify(self, plan: StepPlan, request: Request, drafts: tuple[int, ...]) -> None:
        """Run the newest token and drafts behind it. Until it is known which are right the request does not
        run again.
        """
        assert request.drafting is not None, "it asked for drafts"
        start, num_tokens = len(request.token_ids), 1 + len(drafts)
        request.drafting.begin(start, drafts)
        plan.row_updates.append(RowUpdate(request.slot, start, drafts, request.num_computed_tokens))
        plan.prefills.append(PrefillRow(request.slot, num_tokens, True, num_drafts=len(drafts)))
        request.num_computed_tokens += num_tokens
        request.num_pending += num_tokens
        request.ready_step = NEVER
        self._rolled_back.pop(request, None)  # the ranks are told where its drafts begin

    def _roll_back(self, plan: StepPlan) -> None:
        """Tell the ranks how much of these requests is right."""
        for request, num_computed in self._rolled_back.items():
            if request.status is RequestStatus.RUNNING:
                plan.row_updates.append(RowUpdate(request.slot, num_computed, (), num_computed))
        self._rolled_back.clear()
