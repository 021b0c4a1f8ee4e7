"""BlockManager: which KV blocks are free, cached or used, and by how many. Plain integers; knows no request.

A block is *used* while its reference count is above 0. At 0 it is *cached* if the prefix cache can still find
it, else *free*. Both wait in one queue, free blocks in front, cached ones in order of last use; allocation
takes from the front, so that a cached block is forgotten only when nothing else is left.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def extend_digests(digests: list[bytes], token_ids: Sequence[int], block_size: int) -> None:
    """Append the digests of full blocks that digests lacks. Each covers all tokens up to its block's end."""
    for end in range((len(digests) + 1) * block_size, len(token_ids) + 1, block_size):
        parent = digests[-1] if digests else b""
        tokens = array("i", token_ids[end - block_size : end]).tobytes()
        digests.append(blake2b(parent + tokens, digest_size=32).digest())


class BlockManager:
    """Reference-counted blocks 0 … num_blocks − 1. Every operation costs O(1) per block."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._unused: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated: free and cached."""
        return len(self._unused)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._unused)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, digests: Sequence[bytes], num_tokens: int) -> list[int]:
        """The longest cached chain of whole blocks that leaves at least one of num_tokens to be computed."""
        blocks: list[int] = []
        for digest in digests[: (num_tokens - 1) // self.block_size]:
            if digest not in self._block_of:
                break
            blocks.append(self._block_of[digest])
        return blocks

    def can_allocate(self, num_new: int, shared: Sequence[int] = ()) -> bool:
        """Whether num_new blocks are left after `shared` have come into use."""
        revived = sum(self._ref_counts[block] == 0 for block in shared)
        return num_new + revived <= len(self._unused)

    def take(self) -> int:
        """A writable block: the first of the queue, forgotten by the cache. can_allocate(1) must hold."""
        block, _ = self._unused.popitem(last=False)
        self._ref_counts[block] = 1
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
        return block

    def extend(self, block_ids: list[int], count: int) -> list[int]:
        """Append count new blocks, writable, to a table and return them. can_allocate(count) must hold."""
        new = [self.take() for _ in range(count)]
        block_ids += new
        return new

    def fork(self, parent_blocks: Sequence[int], num_tokens: int) -> list[int]:
        """A table that shares the blocks of the parent's first num_tokens tokens. The parent is another table
        or a prefix found in the cache. A last block that is not full must be made writable before use."""
        block_ids = list(parent_blocks[: self.blocks_for(num_tokens)])
        for block in block_ids:
            self._unused.pop(block, None)
            self._ref_counts[block] += 1
        return block_ids

    def is_writable(self, block: int) -> bool:
        """Nobody else reads this block, now or through the prefix cache."""
        return self._ref_counts[block] == 1 and block not in self._digest_of

    def make_writable(self, block_ids: list[int], index: int) -> tuple[int, int] | None:
        """Copy on write: see that the block at index is the table's own. can_allocate(1) must hold.

        Returns the (src, dst) to copy before the block is written, or None if it was writable.
        """
        src = block_ids[index]
        if self.is_writable(src):
            return None
        block_ids[index] = dst = self.take()
        self.free([src])
        return src, dst

    def register(self, block: int, digest: bytes) -> None:
        """Let the prefix cache find a used block: its tokens are known and their KV is written or planned.

        Of two blocks with the same content the first is kept; the second stays its owner's alone.
        """
        assert self._ref_counts[block] > 0, f"block {block} is not in use"
        if self.enable_prefix_caching and digest not in self._block_of:
            assert block not in self._digest_of, f"block {block} is registered under another digest"
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def free(self, block_ids: Sequence[int]) -> None:
        """Drop one reference to each block of a table. Its end is reused first: prefixes are worth more."""
        for block in reversed(block_ids):
            assert self._ref_counts[block] > 0, f"block {block} is freed twice"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._unused[block] = None
                self._unused.move_to_end(block, last=block in self._digest_of)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that the books agree with each other and with the tables of all running requests."""
        expected = Counter(block for table in tables for block in table)
        for block, count in enumerate(self._ref_counts):
            assert count == expected[block], f"block {block}: {count} references, {expected[block]} tables"
            assert (count == 0) == (block in self._unused), f"block {block} is both used and free"
        num_cached = sum(block in self._digest_of for block in self._unused)
        num_free = len(self._unused) - num_cached
        num_used = sum(count > 0 for count in self._ref_counts)
        assert num_free + num_cached + num_used == self.num_blocks, "free + cached + used must be total"
        assert self._block_of == {digest: block for block, digest in self._digest_of.items()}, (
            "cache disagrees"
        )
