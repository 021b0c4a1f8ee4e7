"""The inputs of a step, gathered on the device from the slot tables."""

from __future__ import annotations

import torch

from distllm.kernels.batch import TokenBatch


def gather_batch(
    num_computed: torch.Tensor,
    block_table: torch.Tensor,
    slots: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    num_tokens: int,
    block_size: int,
    num_decodes: int,
    decode_len: int = 1,
) -> tuple[TokenBatch, torch.Tensor]:
    """The batch of rows that run tokens cu_seqlens_q[i] : cu_seqlens_q[i + 1], from num_computed[slots[i]]
    on.

    num_computed: [num_slots] int; block_table: [num_slots, max_blocks] int32; slots: [num_rows] int;
    cu_seqlens_q: [num_rows + 1] int32, ending with num_tokens; num_decodes, decode_len: see TokenBatch.
    Returns (TokenBatch, token_slots [num_tokens] int64).
    """
    starts, counts = num_computed[slots], cu_seqlens_q.diff()
    rows = torch.repeat_interleave(counts, output_size=num_tokens)
    offsets = torch.arange(num_tokens, device=slots.device) - cu_seqlens_q[rows]
    positions, token_slots = starts[rows] + offsets, slots[rows]
    blocks = block_table[token_slots, positions // block_size].long()
    batch = TokenBatch(
        positions=positions,
        slot_mapping=blocks * block_size + positions % block_size,
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=(starts + counts).int(),
        block_table=block_table[slots],
        num_decodes=num_decodes,
        decode_len=decode_len,
    )
    return batch, token_slots
