"""BlockTables: which KV blocks each running request holds, and what the prefix cache may know of them.

Between the scheduler, which decides who runs, and the BlockManager, which counts blocks and knows no request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from distllm.runtime.block_manager import BlockManager, extend_digests
from distllm.runtime.plan import BlockUpdate
from distllm.runtime.request import Request, RequestStatus


class BlockTables:
    """Keeps request.block_ids, capacity, block_digests, num_registered_blocks and, where a request comes or
    goes, num_computed_tokens."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.blocks = BlockManager(num_blocks, block_size, enable_prefix_caching)

    def try_open(self, request: Request) -> list[tuple[int, int]] | None:
        """Give the request blocks for all its known tokens, sharing what exists; None if there is no room.

        Sets num_computed_tokens to the tokens whose KV exists. Returns the (src, dst) blocks to copy first.
        """
        prefix, num_cached = self._find_prefix(request)
        num_new = self.blocks.blocks_for(len(request.token_ids)) - len(prefix)
        shares_partial = num_cached % self.blocks.block_size > 0
        if not self.blocks.can_allocate(num_new + shares_partial, prefix):
            return None
        request.block_ids = self.blocks.fork(prefix, num_cached)
        copy = self.blocks.make_writable(request.block_ids, len(prefix) - 1) if shares_partial else None
        self.blocks.extend(request.block_ids, num_new)
        request.capacity = len(request.block_ids) * self.blocks.block_size
        request.num_computed_tokens = num_cached
        request.num_registered_blocks = num_cached // self.blocks.block_size
        return [copy] if copy else []

    def try_open_all(self, requests: Sequence[Request]) -> list[tuple[int, int]] | None:
        """As try_open, of all or of none."""
        copies: list[tuple[int, int]] = []
        for number, request in enumerate(requests):
            found = self.try_open(request)
            if found is None:
                for opened in requests[:number]:
                    self.close(opened)
                return None
            copies += found
        return copies

    def has_room(self, num_blocks: int) -> bool:
        return self.blocks.can_allocate(num_blocks)

    def append(self, request: Request) -> BlockUpdate:
        """Append one block, of which the ranks are to be told; has_room(1) must hold. Those before it are
        full: the prefix cache may know them."""
        self.register(request)
        block = self.blocks.take()
        request.block_ids.append(block)
        request.capacity += self.blocks.block_size
        return BlockUpdate(request.slot, len(request.block_ids) - 1, (block,))

    def close(self, request: Request) -> None:
        """Give the blocks back. At once: steps run in order, so the next owner writes after the last read."""
        self.release(request)
        request.num_computed_tokens = 0

    def release(self, request: Request) -> None:
        """As close, of a beam that ends: another one's continuation takes its row."""
        self.register(request)
        self.blocks.free(request.block_ids)
        request.block_ids = []
        request.capacity = 0

    def num_to_branch(self, rows: Sequence[Request], parents: Sequence[int]) -> int:
        """How many blocks branch() takes: one for each row at the border of a block, elsewhere one for each
        row that leaves its place."""
        at_border = rows[parents[0]].num_computed_tokens % self.blocks.block_size == 0
        return sum(at_border or parent != row for row, parent in enumerate(parents))

    def branch(self, rows: Sequence[Request], parents: Sequence[int]) -> list[tuple[int, int]]:
        """Each row goes on from the KV of another, parents[row], or its own: they share blocks by reference,
        and the block to be written next is each one's own. Returns the (src, dst) blocks to copy first.

        A parent is its own parent; the other rows hold no blocks. There must be room for num_to_branch.
        """
        for number in set(parents):
            self.register(rows[number])
        for row, number in zip(rows, parents, strict=True):
            if row is not rows[number]:
                self._share(row, rows[number])
        copies = [self._open_next(row) for row in rows]
        return [copy for copy in copies if copy is not None]

    def _share(self, request: Request, parent: Request) -> None:
        request.block_ids = self.blocks.fork(parent.block_ids, parent.num_computed_tokens)
        request.num_computed_tokens = parent.num_computed_tokens
        request.num_registered_blocks = parent.num_registered_blocks

    def _open_next(self, request: Request) -> tuple[int, int] | None:
        """See that the block of the next token is there and the request's own; the (src, dst) to copy."""
        index, offset = divmod(request.num_computed_tokens, self.blocks.block_size)
        copy = self.blocks.make_writable(request.block_ids, index) if offset else None
        if offset == 0:
            self.blocks.extend(request.block_ids, 1)
        request.capacity = len(request.block_ids) * self.blocks.block_size
        return copy

    def register(self, request: Request) -> None:
        """Offer the prefix cache the blocks whose tokens are all known and planned. To be called when more of
        a prompt is planned; append and close see to what is generated."""
        num_known = min(request.num_computed_tokens, len(request.token_ids))
        num_full = min(num_known // self.blocks.block_size, len(request.block_ids))
        if not self.blocks.enable_prefix_caching or num_full <= request.num_registered_blocks:
            return
        extend_digests(request.block_digests, request.token_ids, self.blocks.block_size)
        for index in range(request.num_registered_blocks, num_full):
            self.blocks.register(request.block_ids[index], request.block_digests[index])
        request.num_registered_blocks = num_full

    def check_integrity(self, running: Iterable[Request]) -> None:
        """Assert that the books agree, and that no block still to be written is shared or cached."""
        requests = list(running)
        self.blocks.check_integrity(request.block_ids for request in requests)
        for request in requests:
            assert request.capacity == len(request.block_ids) * self.blocks.block_size, "capacity is stale"
            for block in request.block_ids[request.num_computed_tokens // self.blocks.block_size :]:
                assert self.blocks.is_writable(block), f"block {block} is still written, yet shared"

    def _find_prefix(self, request: Request) -> tuple[list[int], int]:
        """Blocks that hold the first tokens already, and the number of these: the prefix cache's, or the
        leader's if they reach further. Of the leader's prompt the last token is left, to sample from."""
        if request.scores_prompt:  # each token of it has to be computed
            return [], 0
        prefix: list[int] = []
        if self.blocks.enable_prefix_caching:
            extend_digests(request.block_digests, request.token_ids, self.blocks.block_size)
            prefix = self.blocks.find_prefix(request.block_digests, len(request.token_ids))
        num_cached, num_shared = len(prefix) * self.blocks.block_size, request.num_prompt_tokens - 1
        leader = request.fork_from
        if leader and leader.status is RequestStatus.RUNNING and num_shared > num_cached:
            return leader.block_ids[: self.blocks.blocks_for(num_shared)], num_shared
        return prefix, num_cached
