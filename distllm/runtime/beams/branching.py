"""Branching: beam searches that have decided what their rows hold next, until there are blocks to carry it
out. Rank 0 only.

Collects the rows' results, and moves KV, slots' contents and plan along. Knows no score; who is preempted to
make room, the scheduler says.
"""

from __future__ import annotations

from collections.abc import Callable

from distllm.runtime.beams.beam_rows import BeamRows, common_length
from distllm.runtime.block_tables import BlockTables
from distllm.runtime.plan import BlockUpdate, RowUpdate, StepPlan, TokenLogprobs
from distllm.runtime.request import Request, RequestStatus
from distllm.runtime.running import Running

TryMakeRoom = Callable[[Request, int], bool]  # for so many blocks, at the cost of those behind the request


class Branching:
    def __init__(self, tables: BlockTables, running: Running) -> None:
        self._tables = tables
        self._running = running
        self._decided: list[BeamRows] = []  # running, and waiting for blocks

    def take(self, request: Request, group: BeamRows, logprobs: TokenLogprobs | None) -> bool:
        """Take a row's result; with the last of them the search goes on, or ends: whether it does."""
        if not group.take(request, logprobs):
            return False
        if group.children is None:
            return True
        if request.status is RequestStatus.RUNNING:
            self._decided.append(group)
        else:
            group.take_over()
        return False

    def forget(self, group: BeamRows) -> None:
        """The search is aborted."""
        if group in self._decided:
            self._decided.remove(group)

    def preempt(self, group: BeamRows) -> None:
        """Its rows have left: what is decided costs no blocks any more."""
        if group in self._decided:
            self._decided.remove(group)
            group.take_over()

    def carry_out(self, plan: StepPlan, try_make_room: TryMakeRoom) -> set[Request]:
        """Carry out what searches have decided, in order, as far as there are blocks; their rows then decode.
        Returns these rows: in this step nobody may preempt them.
        """
        branched: set[Request] = set()
        for group in sorted(self._decided, key=lambda group: group.requests[0].order):
            if group in self._decided and self._try_branch(plan, group, try_make_room):
                branched.update(group.requests)
        return branched

    def _try_branch(self, plan: StepPlan, group: BeamRows, try_make_room: TryMakeRoom) -> bool:
        rows, parents = group.requests, group.parents
        for number in set(range(len(rows))).difference(parents):
            self._tables.release(rows[number])
        if not try_make_room(rows[-1], self._tables.num_to_branch(rows, parents)):
            return False
        self._decided.remove(group)
        tables = [row.block_ids.copy() for row in rows]
        plan.block_copies += self._tables.branch(rows, parents)
        for row, start, table in zip(rows, group.take_over(), tables, strict=True):
            _update_row(plan, row, start, common_length(table, row.block_ids))
            row.ready_step = plan.step
            self._running.decode(row)
        return True


def _update_row(plan: StepPlan, row: Request, first_token: int, first_block: int) -> None:
    """Tell the ranks what a row holds from these places on."""
    tokens, blocks = tuple(row.token_ids[first_token:]), tuple(row.block_ids[first_block:])
    if first_token:
        plan.row_updates.append(RowUpdate(row.slot, first_token, tokens, row.num_computed_tokens))
    else:
        plan.new_rows.append(row.row_init)
    if blocks:
        plan.block_updates.append(BlockUpdate(row.slot, first_block, blocks))
