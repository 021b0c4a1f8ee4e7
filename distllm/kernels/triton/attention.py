"""Causal attention over the paged KV cache: the batch's decodes in one kernel, its other rows in another."""

from __future__ import annotations

import torch

from distllm.kernels.batch import TokenBatch
from distllm.kernels.triton.decode_attention import decode_attention
from distllm.kernels.triton.prefill_attention import prefill_attention


def paged_attention(
    q: torch.Tensor,
    kv_cache_layer: torch.Tensor,
    batch: TokenBatch,
    scale: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = q.shape
    out = q.new_empty(num_tokens, num_heads * head_dim)
    args = (q, kv_cache_layer, batch, scale, window, softcap, alibi_slopes, out)
    if batch.num_decodes:
        decode_attention(*args)
    if batch.num_decodes < len(batch.seq_lens):
        prefill_attention(*args)
    return out
