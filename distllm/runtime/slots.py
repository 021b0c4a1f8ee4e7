"""SlotTables: the device-side state of every running sequence, one row a slot. Changed by plans, read by
kernels.

Every rank holds the same rows; the first stage and the last read token ids, the last one sampling parameters.
All tables lie in one piece of memory, so that a plan's changes are one copy and one scatter. Knows no
request: a slot's owner is the scheduler's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np
import torch

from distllm.runtime.plan import RowInit, RowSampling, RowUpdate, StepPlan
from distllm.runtime.staging import to_device

_LONGS = ("seed", "top_k", "num_prompt")  # int64: two words each
_FLOATS = ("temperature", "top_p", "min_p")

_Part = tuple[int, int]  # of the memory: its first word, and words of a row
_Run = tuple[int, Sequence[int]]  # a word of the memory, and what it and those behind it become


class SlotTables:
    """All tensors are allocated once; a row means nothing before a RowInit has written it."""

    def __init__(
        self, num_slots: int, max_model_len: int, block_size: int, padding_block: int, device: torch.device
    ) -> None:
        """padding_block: a KV block that no sequence owns, for the row that fills captured batches up."""
        rows, max_blocks = num_slots + 1, -(-max_model_len // block_size)
        self.padding_slot = num_slots
        self.block_size = block_size
        self.device = device
        widths = [2 * len(_LONGS), len(_FLOATS), 1, max_model_len, max_blocks]  # words of a row
        ends = accumulate(rows * width for width in widths)
        parts: list[_Part] = [(end - rows * width, width) for end, width in zip(ends, widths, strict=True)]
        self._long_part, self._float_part, self._computed_part, self._token_part, self._block_part = parts
        self._words = torch.zeros(rows * sum(widths), dtype=torch.int32, device=device)
        longs, floats, num_computed, token_ids, block_table = (
            part.view(rows, -1) for part in self._words.split([rows * width for width in widths])
        )
        self._longs, self._floats = longs.view(torch.int64), floats.view(torch.float32)
        self.num_computed = num_computed.view(rows)
        self.token_ids, self.block_table = token_ids, block_table
        self.block_table[self.padding_slot] = padding_block
        # What decides control flow is kept on the host too; it is the same on every rank, since plans are.
        self.sampling: list[RowSampling] = [RowSampling()] * num_slots
        self._special: set[int] = set()  # slots whose rows are not plain
        self.token_masks: dict[int, bytes] = {}  # of the last plan applied

    def parameters(self, slots: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of these rows, [num_rows]: seed, top_k, num_prompt (int64), temperature, top_p, min_p (fp32)."""
        longs, floats = self._longs[slots].t().contiguous(), self._floats[slots].t().contiguous()
        return dict(zip((*_LONGS, *_FLOATS), (*longs, *floats), strict=True))

    def special_rows(self, slots: Sequence[int]) -> list[RowSampling]:
        """Of these slots, the parameters that are not plain or come with a mask. Asked in every step: most
        have none.
        """
        special = self._special | self.token_masks.keys() if self.token_masks else self._special
        return [self.sampling[slot] for slot in slots if slot in special] if special else []

    def advance(self, slots: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """The KV of these rows is written up to seq_lens [num_rows]; the padding row stays at its
        beginning.
        """
        self.num_computed[slots] = torch.where(slots == self.padding_slot, 0, seq_lens)

    def write_tokens(self, slots: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Sampled tokens become the inputs of a later step. All [num_rows] int64."""
        self.token_ids[slots, positions] = token_ids.int()

    def apply(self, plan: StepPlan) -> None:
        """Take up what the plan changes in the rows: one copy and one scatter, whatever it is."""
        self.token_masks = plan.token_masks
        runs = [run for row in plan.new_rows for run in self._init_row(row)]
        runs += [run for row in plan.row_updates for run in self._update_row(row)]
        runs += [_run(self._block_part, u.slot, u.start, u.block_ids) for u in plan.block_updates]
        if not runs:
            return
        firsts, counts = np.array([(first, len(words)) for first, words in runs]).T
        ends = counts.cumsum()
        index = np.arange(ends[-1]) + np.repeat(firsts - ends + counts, counts)
        values = np.fromiter(chain.from_iterable(words for _, words in runs), np.int64, len(index))
        changes = to_device(np.stack([index, values]), torch.int64, self.device)
        self._words[changes[0]] = changes[1].int()

    def _init_row(self, row: RowInit) -> list[_Run]:
        self.sampling[row.slot] = sampling = row.sampling
        (self._special.discard if sampling.is_plain else self._special.add)(row.slot)
        longs = np.array([sampling.seed, sampling.top_k, row.num_prompt_tokens], dtype=np.int64)
        floats = np.array([sampling.temperature, sampling.top_p, sampling.min_p], dtype=np.float32)
        return [
            _run(self._long_part, row.slot, 0, longs.view(np.int32).tolist()),
            _run(self._float_part, row.slot, 0, floats.view(np.int32).tolist()),
            _run(self._computed_part, row.slot, 0, (row.num_computed_tokens,)),
            _run(self._token_part, row.slot, 0, row.token_ids),
        ]

    def _update_row(self, row: RowUpdate) -> list[_Run]:
        return [
            _run(self._computed_part, row.slot, 0, (row.num_computed_tokens,)),
            _run(self._token_part, row.slot, row.start, row.token_ids),
        ]


def _run(part: _Part, slot: int, column: int, values: Sequence[int]) -> _Run:
    """From this column of the slot's row on."""
    first, width = part
    return first + slot * width + column, values
