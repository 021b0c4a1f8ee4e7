"""Causal attention over the paged KV cache: which kernel runs a batch. Rows of one token each are decodes."""

from __future__ import annotations

import torch

from distllm.kernels.batch import TokenBatch
from distllm.kernels.triton.decode_attention import decode_attention
from distllm.kernels.triton.prefill_attention import prefill_attention


def paged_attention(
    q: torch.Tensor, kv_cache_layer: torch.Tensor, batch: TokenBatch, scale: float
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = q.shape
    out = q.new_empty(num_tokens, num_heads * head_dim)
    attention = decode_attention if num_tokens == len(batch.seq_lens) else prefill_attention
    attention(q, kv_cache_layer, batch, scale, out)
    return out
