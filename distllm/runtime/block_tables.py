"""BlockTables: which KV blocks each running request holds, and what the prefix cache may know of them.

Between the scheduler, which decides who runs, and the BlockManager, which counts blocks and knows no request.
"""

from __future__ import annotations

from collections.abc import Iterable

from distllm.runtime.block_manager import BlockManager, extend_digests
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

    def has_room(self, num_blocks: int) -> bool:
        return self.blocks.can_allocate(num_blocks)

    def append(self, request: Request) -> int:
        """Append one block and return it; has_room(1) must hold. Those before it are full: the prefix cache
        may know them."""
        self.register(request)
        block = self.blocks.take()
        request.block_ids.append(block)
        request.capacity += self.blocks.block_size
        return block

    def close(self, request: Request) -> None:
        """Give the blocks back. At once: steps run in order, so the next owner writes after the last read."""
        self.register(request)
        self.blocks.free(request.block_ids)
        request.block_ids = []
        request.capacity = request.num_computed_tokens = 0

    def register(self, request: Request) -> None:
        """Offer the prefix cache the blocks whose tokens are all known and planned. To be called when more of
        a prompt is planned; append and close see to what is generated."""
        num_known = min(request.num_computed_tokens, len(request.token_ids))
        num_full = num_known // self.blocks.block_size
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
