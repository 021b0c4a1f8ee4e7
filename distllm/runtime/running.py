"""Running: which request holds which slot, and which of them prefill or decode. Rank 0 only.

The two groups are kept from step to step instead of being found again: in a steady batch nobody moves. Knows
no block and no policy; the scheduler says who enters and leaves.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterable
from operator import attrgetter

from distllm.runtime.request import Request

BY_ORDER, BY_SLOT = attrgetter("order"), attrgetter("slot")


class Running:
    """A request that waits only for its last results holds a slot and is in neither group."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.by_slot: dict[int, Request] = {}
        self.prefills: list[Request] = []  # more than one token to compute; by Request.order
        self.decodes: list[
            Request
        ] = []  # one token to compute, and the one that it samples is wanted; by slot
        self.free_slots = list(range(num_slots))  # a heap: low slots first keeps slot ranges whole

    def enter(self, request: Request) -> int:
        """Give the request a slot, of which there must be one. It is a prefill until end_prefill."""
        insort(self.prefills, request, key=BY_ORDER)
        return self.hold(request)

    def hold(self, request: Request) -> int:
        """As enter, but with nothing to compute yet."""
        request.slot = slot = heapq.heappop(self.free_slots)
        self.by_slot[slot] = request
        return slot

    def end_prefill(self, request: Request) -> None:
        """One token is left to compute: the request decodes from now on, if it may have more tokens."""
        self.prefills.remove(request)
        if request.wants_tokens:
            self.decode(request)

    def decode(self, request: Request) -> None:
        """One token of a request in neither group is to be computed."""
        insort(self.decodes, request, key=BY_SLOT)

    def leave(self, request: Request) -> None:
        del self.by_slot[request.slot]
        for group in (self.prefills, self.decodes):
            if request in group:
                group.remove(request)
        self.release_slot(request)

    def release_slot(self, request: Request) -> None:
        """Free the slot of a request that left, unless a sampled token has still to be written to its row."""
        if request.slot >= 0 and request.num_pending == 0:
            heapq.heappush(self.free_slots, request.slot)
            request.slot = -1

    def check_integrity(self, others: Iterable[Request]) -> None:
        """Assert that groups and slots agree with the requests; others: those that may hold a slot still."""
        running = [self.by_slot[slot] for slot in sorted(self.by_slot)]
        held = {request.slot for request in (*running, *others)} - {-1}
        slots = sorted([*held, *self.free_slots])
        assert slots == list(range(self.num_slots)), f"a slot is lost or shared: {slots}"
        assert all(request.slot == slot for slot, request in self.by_slot.items()), "a slot changed hands"
        prefills = [request for request in running if request.num_uncomputed_tokens > 1]
        decodes = [r for r in running if r.num_uncomputed_tokens == 1 and r.wants_tokens]
        assert self.prefills == sorted(prefills, key=BY_ORDER), "a running prefill is lost"
        assert self.decodes == decodes, "a running decode is lost"
