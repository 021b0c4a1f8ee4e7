"""The inputs of a step from the slot tables: one launch, nothing read back by the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distllm.kernels.batch import TokenBatch
from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs

TOKENS = 256  # of one program


@triton.jit
def _gather_kernel(
    num_computed,
    table,
    slots,
    cu_seqlens,
    positions,
    slot_mapping,
    token_slots,
    seq_lens,
    rows_out,
    table_width,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Program (row, chunk) writes TOKENS tokens of its row; chunk 0 also the row's length and block table."""
    wait_for_inputs()
    row, chunk = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    start = tl.load(num_computed + slot)
    begin, end = tl.load(cu_seqlens + row), tl.load(cu_seqlens + row + 1)
    offsets = chunk * TOKENS + tl.arange(0, TOKENS)
    inside = offsets < end - begin
    position = start + offsets
    block = tl.load(table + slot * table_width + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    tl.store(positions + begin + offsets, position, mask=inside)
    tl.store(slot_mapping + begin + offsets, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=inside)
    tl.store(token_slots + begin + offsets, slot + tl.zeros([TOKENS], tl.int64), mask=inside)
    if chunk == 0:
        seq_len = start + end - begin
        tl.store(seq_lens + row, seq_len.to(tl.int32))
        used = (seq_len + BLOCK_SIZE - 1) // BLOCK_SIZE
        for first in range(0, used, TOKENS):
            columns = first + tl.arange(0, TOKENS)
            blocks = tl.load(table + slot * table_width + columns, mask=columns < used)
            tl.store(rows_out + row.to(tl.int64) * table_width + columns, blocks, mask=columns < used)


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
    num_rows, width = len(slots), block_table.shape[1]
    batch = TokenBatch(
        positions=torch.empty(num_tokens, dtype=torch.int64, device=slots.device),
        slot_mapping=torch.empty(num_tokens, dtype=torch.int64, device=slots.device),
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=torch.empty(num_rows, dtype=torch.int32, device=slots.device),
        block_table=torch.empty(num_rows, width, dtype=torch.int32, device=slots.device),
        num_decodes=num_decodes,
        decode_len=decode_len,
    )
    token_slots = torch.empty_like(batch.positions)
    chunks = triton.cdiv(num_tokens, TOKENS)  # one row may have all tokens
    _gather_kernel[(num_rows, chunks)](
        num_computed, block_table, slots, cu_seqlens_q, batch.positions, batch.slot_mapping, token_slots,
        batch.seq_lens, batch.block_table, width, block_size, TOKENS, num_warps=4, **OVERLAP,
    )  # fmt: skip
    return batch, token_slots
