"""BlockManager alone: references, the order of reuse, prefix hits, copy on write, and its own books."""

from __future__ import annotations

import random

import pytest

from distllm.runtime.block_manager import BlockManager, extend_digests


def digests_of(token_ids: list[int], block_size: int) -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, token_ids, block_size)
    return digests


def new_table(manager: BlockManager, count: int) -> list[int]:
    table: list[int] = []
    manager.extend(table, count)
    return table


def fill(manager: BlockManager, token_ids: list[int]) -> list[int]:
    """A table of registered blocks for the full blocks of token_ids."""
    table: list[int] = []
    digests = digests_of(token_ids, manager.block_size)
    for block, digest in zip(manager.extend(table, len(digests)), digests, strict=True):
        manager.register(block, digest)
    return table


def test_digests_cover_the_whole_prefix_and_grow_in_place() -> None:
    tokens = [random.Random(1).randrange(1000) for _ in range(23)]
    digests = digests_of(tokens, 4)
    assert len(digests) == 5 and len(set(digests)) == 5
    grown = digests_of(tokens[:10], 4)
    extend_digests(grown, tokens, 4)
    assert grown == digests
    for changed in range(20):
        other = [*tokens[:changed], tokens[changed] + 1, *tokens[changed + 1 :]]
        same = [a == b for a, b in zip(digests_of(other, 4), digests, strict=True)]
        assert same == [block < changed // 4 for block in range(5)]


def test_digests_keep_token_borders_apart() -> None:
    assert digests_of([1, 23], 2) != digests_of([12, 3], 2)
    assert digests_of([256], 1) != digests_of([1], 1)


def test_allocation_until_empty_and_back() -> None:
    manager = BlockManager(5, 4, True)
    table = new_table(manager, 5)
    assert sorted(table) == [0, 1, 2, 3, 4]
    assert not manager.can_allocate(1) and manager.num_used == 5
    manager.check_integrity([table])
    manager.free(table)
    assert manager.num_available == 5 and manager.num_used == 0
    manager.check_integrity([])


def test_double_free_is_noticed() -> None:
    manager = BlockManager(2, 4, True)
    table = new_table(manager, 1)
    manager.free(table)
    with pytest.raises(AssertionError, match="freed twice"):
        manager.free(table)


@pytest.mark.parametrize(
    ("num_tokens", "num_hits"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3)]
)
def test_hits_are_whole_blocks_and_leave_a_token(num_tokens: int, num_hits: int) -> None:
    manager, tokens = BlockManager(8, 4, True), list(range(12))
    table = fill(manager, tokens)
    assert manager.find_prefix(digests_of([*tokens, 99][:num_tokens], 4), num_tokens) == table[:num_hits]


def test_a_hole_in_the_chain_ends_the_hit() -> None:
    manager, tokens = BlockManager(3, 2, True), [1, 2, 3, 4, 5, 6]
    table = fill(manager, tokens)
    manager.free(table)
    (evicted,) = manager.extend([], 1)
    assert evicted == table[2], "the end of a prefix goes first"
    assert manager.find_prefix(digests_of([*tokens, 7], 2), 7) == table[:2]


def test_free_blocks_go_before_cached_ones_and_the_oldest_cached_first() -> None:
    manager = BlockManager(4, 2, True)
    first, second = fill(manager, [1, 2]), fill(manager, [3, 4])
    plain = new_table(manager, 1)
    for table in (first, second, plain):
        manager.free(table)
    assert manager.find_prefix(digests_of([1, 2], 2), 3) == first  # freed, and still to be found
    order = manager.extend([], 4)
    assert set(order[:2]) == {*plain, 3} and order[2:] == [*first, *second]
    assert manager.find_prefix(digests_of([1, 2], 2), 3) == []


def test_use_makes_a_cached_block_young_again() -> None:
    manager = BlockManager(2, 2, True)
    first, second = fill(manager, [1, 2]), fill(manager, [3, 4])
    manager.free(first)
    manager.free(second)
    manager.free(manager.fork(first, 2))
    assert manager.extend([], 2) == [*second, *first]


def test_fork_shares_blocks_by_reference() -> None:
    manager = BlockManager(4, 4, False)
    parent = new_table(manager, 3)
    child = manager.fork(parent, 5)
    assert child == parent[:2] and manager.num_used == 3
    manager.check_integrity([parent, child])
    manager.free(parent)
    assert manager.num_used == 2
    manager.check_integrity([child])


def test_reviving_cached_blocks_uses_up_room() -> None:
    manager = BlockManager(3, 2, True)
    table = fill(manager, [1, 2, 3, 4])
    manager.free(table)
    assert manager.can_allocate(1, table) and not manager.can_allocate(2, table)
    assert manager.can_allocate(3)


def test_copy_on_write_of_shared_and_of_cached_blocks_only() -> None:
    manager = BlockManager(6, 4, True)
    parent = new_table(manager, 2)
    assert manager.make_writable(parent, 1) is None
    child = manager.fork(parent, 6)
    assert manager.make_writable(child, 1) == (parent[1], child[1])
    assert child[0] == parent[0] and child[1] != parent[1]
    assert manager.is_writable(parent[1]) and manager.is_writable(child[1])
    (cached,) = table = fill(manager, [1, 2, 3, 4])
    assert manager.make_writable(table, 0) == (cached, table[0])
    assert cached != table[0]
    assert manager.find_prefix(digests_of([1, 2, 3, 4], 4), 5) == [cached], "the cached block is as it was"
    manager.check_integrity([parent, child, table])


def test_same_content_is_registered_once() -> None:
    manager = BlockManager(3, 2, True)
    first, second = fill(manager, [1, 2]), fill(manager, [1, 2])
    assert manager.find_prefix(digests_of([1, 2], 2), 3) == first
    manager.free(second)
    manager.free(first)
    assert manager.extend([], 3)[-1] == first[0], "the twin counts as free, not as cached"


def test_without_prefix_caching_nothing_is_found() -> None:
    manager = BlockManager(3, 2, False)
    fill(manager, [1, 2])
    assert manager.find_prefix(digests_of([1, 2], 2), 3) == []


def test_integrity_sees_wrong_books() -> None:
    manager = BlockManager(3, 2, True)
    table = new_table(manager, 2)
    with pytest.raises(AssertionError, match="1 references, 0 tables"):
        manager.check_integrity([])
    with pytest.raises(AssertionError, match="1 references, 2 tables"):
        manager.check_integrity([table, table[:1]])
    manager._unused[table[0]] = None
    with pytest.raises(AssertionError, match="both used and free"):
        manager.check_integrity([table])
