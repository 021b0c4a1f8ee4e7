"""SlotTables: the device-side state of every running sequence, one row a slot. Changed by plans, read by
kernels.

Every rank holds the same rows; only the first stage reads token ids, only the last one sampling columns.
Knows no request: a slot's owner is the scheduler's business.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distllm.runtime.plan import BlockUpdate, RowInit, RowSampling, StepPlan
from distllm.runtime.staging import to_device

_COLUMNS = {
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "min_p": torch.float32,
    "seed": torch.int64,
}


class SlotTables:
    """All tensors are allocated once; a row means nothing before a RowInit has written it."""

    def __init__(
        self, num_slots: int, max_model_len: int, block_size: int, padding_block: int, device: torch.device
    ) -> None:
        """padding_block: a KV block that no sequence owns, for the row that fills captured batches up."""

        def table(*columns: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(num_slots + 1, *columns, dtype=dtype, device=device)

        self.padding_slot = num_slots
        self.block_size = block_size
        self.device = device
        self.token_ids = table(max_model_len, dtype=torch.int32)
        self.block_table = table(-(-max_model_len // block_size), dtype=torch.int32)
        self.block_table[self.padding_slot] = padding_block
        self.num_computed = table()
        self.num_prompt = table()
        self.columns = {name: table(dtype=dtype) for name, dtype in _COLUMNS.items()}
        # What decides control flow is kept on the host too; it is the same on every rank, since plans are.
        self.sampling: list[RowSampling] = [RowSampling()] * num_slots

    def advance(self, slots: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """The KV of these rows is written up to seq_lens [num_rows]; the padding row stays at its
        beginning.
        """
        self.num_computed[slots] = torch.where(slots == self.padding_slot, 0, seq_lens.long())

    def apply(self, plan: StepPlan) -> None:
        """Take up what the plan changes in the rows: one copy and one scatter for each table that changes."""
        if plan.new_rows:
            self._init_rows(plan.new_rows)
        if plan.block_updates:
            self._append_blocks(plan.block_updates)

    def write_tokens(self, slots: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Sampled tokens become the inputs of a later step. All [num_rows] int64."""
        self.token_ids[slots, positions] = token_ids.int()

    def _init_rows(self, rows: list[RowInit]) -> None:
        for row in rows:
            self.sampling[row.slot] = row.sampling
        slots = to_device([row.slot for row in rows], torch.int64, self.device)
        self._set(self.num_computed, slots, [row.num_computed_tokens for row in rows])
        self._set(self.num_prompt, slots, [row.num_prompt_tokens for row in rows])
        for name, column in self.columns.items():
            self._set(column, slots, [getattr(row.sampling, name) for row in rows])
        self._write(self.token_ids, [(row.slot, 0, row.token_ids) for row in rows])

    def _append_blocks(self, updates: list[BlockUpdate]) -> None:
        self._write(self.block_table, [(update.slot, update.start, update.block_ids) for update in updates])

    def _set(self, column: torch.Tensor, slots: torch.Tensor, values: list[int] | list[float]) -> None:
        column[slots] = to_device(values, column.dtype, self.device)

    def _write(self, table: torch.Tensor, runs: list[tuple[int, int, Sequence[int]]]) -> None:
        """table[slot, start : start + len(values)] = values, for every run."""
        width = table.shape[1]
        places = [np.arange(slot * width + start, slot * width + start + len(v)) for slot, start, v in runs]
        index = to_device(np.concatenate(places), torch.int64, self.device)
        values = np.concatenate([np.asarray(v, dtype=np.int32) for _, _, v in runs])
        table.view(-1)[index] = to_device(values, table.dtype, self.device)
