"""The slot gather against a loop in Python."""

from __future__ import annotations

import random

import torch

from distllm.kernels.reference.gather import gather_batch


def test_gather_matches_a_loop() -> None:
    rng = random.Random(0)
    for _ in range(50):
        num_slots, block_size, max_blocks = rng.randint(1, 12), rng.choice([1, 3, 16]), 9
        num_computed = torch.tensor([rng.randrange(0, 4 * block_size) for _ in range(num_slots)])
        table = torch.randperm(num_slots * max_blocks).int().view(num_slots, max_blocks)
        slots = rng.sample(range(num_slots), rng.randint(1, num_slots))
        counts = [rng.randint(1, 4 * block_size) for _ in slots]
        starts = torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32)
        batch, token_slots = gather_batch(
            num_computed, table, torch.tensor(slots), starts, sum(counts), block_size, 2
        )
        expected = [
            (slot, position, table[slot, position // block_size].item() * block_size + position % block_size)
            for slot, count in zip(slots, counts, strict=True)
            for position in range(num_computed[slot], num_computed[slot] + count)
        ]
        got = zip(token_slots.tolist(), batch.positions.tolist(), batch.slot_mapping.tolist(), strict=True)
        assert list(got) == expected
        assert batch.seq_lens.tolist() == [
            num_computed[s].item() + c for s, c in zip(slots, counts, strict=True)
        ]
        assert torch.equal(batch.block_table, table[slots])
        assert batch.num_decodes == 2
