"""What a grammar forbids, as packed bits, into logits: one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from distllm.kernels.triton.launch import OVERLAP, wait_for_inputs

BLOCK = 4096


@triton.jit
def _mask_kernel(logits, masks, numbers, out, vocab_size, stride, width, BLOCK: tl.constexpr):
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab_size
    number = tl.load(numbers + row)
    x = tl.load(logits + row * stride + columns, mask=inside)
    packed = tl.load(masks + tl.maximum(number, 0) * width + columns // 8, mask=inside)
    allowed = tl.where(number < 0, 1, (packed.to(tl.int32) >> (columns % 8)) & 1)
    tl.store(out + row * vocab_size + columns, tl.where(allowed != 0, x, float("-inf")), mask=inside)


def mask_logits(logits: torch.Tensor, masks: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    (num_rows, vocab_size), width = logits.shape, masks.shape[1]
    out = logits.new_empty(num_rows, vocab_size)
    _mask_kernel[(num_rows, triton.cdiv(vocab_size, BLOCK))](
        logits, masks, numbers, out, vocab_size, logits.stride(0), width, BLOCK, num_warps=8, **OVERLAP
    )
    return out
