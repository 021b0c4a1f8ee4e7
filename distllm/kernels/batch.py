"""TokenBatch: where each token of one step stands. Made on the device by the slot gather, read by kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TokenBatch:
    """The rows of one step, packed. Row i holds tokens cu_seqlens_q[i] : cu_seqlens_q[i + 1].

    A token at position p sees positions 0 … p of its row; the KV of position p lies in block
    block_table[i, p // block_size] at offset p % block_size. Rows known to be decodes run together, and
    apart from the others; to count one of those among the others is slower, never wrong. Where all rows are
    decodes they may have a few tokens each, as in verifications of drafts.
    """

    positions: torch.Tensor  # [num_tokens] int64
    slot_mapping: (
        torch.Tensor
    )  # [num_tokens] int64, block id · block_size + offset, where this token's KV goes
    cu_seqlens_q: torch.Tensor  # [num_rows + 1] int32
    seq_lens: torch.Tensor  # [num_rows] int32, this step's tokens included
    block_table: torch.Tensor  # [num_rows, max_blocks] int32
    num_decodes: int  # the first num_decodes rows have at most decode_len tokens each
    decode_len: int = 1  # more only where num_decodes is num_rows; what a last row has beyond is padding

    def __post_init__(self) -> None:
        assert self.decode_len == 1 or self.num_decodes == len(self.seq_lens), (
            "decodes and others in one batch"
        )
