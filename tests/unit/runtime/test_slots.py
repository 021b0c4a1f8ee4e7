"""The slot tables against plain arrays, changed by random plans."""

from __future__ import annotations

import random

import numpy as np
import torch

from distllm.runtime.plan import BlockUpdate, RowInit, RowSampling, RowUpdate, StepPlan
from distllm.runtime.slots import SlotTables

SLOTS, LENGTH, BLOCK = 7, 37, 4
WIDTH = -(-LENGTH // BLOCK)


def random_tokens(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randrange(2**31) for _ in range(rng.randrange(1, LENGTH + 1)))


def random_plan(rng: random.Random, step: int) -> StepPlan:
    plan = StepPlan(step)
    for slot in rng.sample(range(SLOTS), rng.randrange(3)):
        token_ids = random_tokens(rng)
        sampling = RowSampling(
            rng.random(), rng.randrange(9), rng.random(), rng.random(), rng.randrange(-(2**63), 2**63)
        )
        plan.new_rows.append(RowInit(slot, token_ids, rng.randrange(1, 9), rng.randrange(9), sampling))
    for slot in rng.sample(sorted(set(range(SLOTS)) - {row.slot for row in plan.new_rows}), rng.randrange(3)):
        token_ids = random_tokens(rng)
        start = rng.randrange(LENGTH + 1 - len(token_ids))
        plan.row_updates.append(RowUpdate(slot, start, token_ids, rng.randrange(9)))
    for slot in rng.sample(range(SLOTS), rng.randrange(4)):
        start = rng.randrange(WIDTH)
        block_ids = tuple(rng.randrange(99) for _ in range(rng.randrange(1, WIDTH - start + 1)))
        plan.block_updates.append(BlockUpdate(slot, start, block_ids))
    return plan


def test_plans_change_the_rows_they_name_and_nothing_else() -> None:
    rng = random.Random(5)
    tables = SlotTables(SLOTS, LENGTH, BLOCK, padding_block=99, device=torch.device("cpu"))
    token_ids, blocks = np.zeros((SLOTS + 1, LENGTH), int), np.zeros((SLOTS + 1, WIDTH), int)
    blocks[SLOTS] = 99
    computed = np.zeros(SLOTS + 1, int)
    rows = [RowInit(slot, (), 0, 0, RowSampling(top_p=0)) for slot in range(SLOTS + 1)]
    for step in range(60):
        plan = random_plan(rng, step)
        tables.apply(plan)
        for row in plan.new_rows:
            token_ids[row.slot, : len(row.token_ids)] = row.token_ids
            computed[row.slot] = row.num_computed_tokens
            rows[row.slot] = row
        for changed in plan.row_updates:
            token_ids[changed.slot, changed.start : changed.start + len(changed.token_ids)] = (
                changed.token_ids
            )
            computed[changed.slot] = changed.num_computed_tokens
        for update in plan.block_updates:
            blocks[update.slot, update.start : update.start + len(update.block_ids)] = update.block_ids
        assert tables.token_ids.tolist() == token_ids.tolist()
        assert tables.block_table.tolist() == blocks.tolist()
        assert tables.num_computed.tolist() == computed.tolist()
    parameters = tables.parameters(torch.arange(SLOTS))
    assert parameters.pop("num_prompt").tolist() == [row.num_prompt_tokens for row in rows[:SLOTS]]
    for name, column in parameters.items():
        expected = torch.tensor([getattr(row.sampling, name) for row in rows[:SLOTS]], dtype=column.dtype)
        assert column.tolist() == expected.tolist(), name
    assert all(column.is_contiguous() for column in parameters.values()), "kernels read them by row number"
