"""Causal attention of ragged rows over the paged KV cache: prefill, chunks and decode in one operation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distllm.kernels.batch import TokenBatch


def paged_attention(
    q: torch.Tensor, kv_cache_layer: torch.Tensor, batch: TokenBatch, scale: float
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v, where a token at position p sees positions 0 … p of its own row.

    q: [num_tokens, num_heads, head_dim]; num_heads is a multiple of num_kv_heads, and consecutive heads
    share a KV head. kv_cache_layer: [2, num_blocks, block_size, num_kv_heads, head_dim]; this step's KV is
    already in it. Every row has at least one token. Returns [num_tokens, num_heads · head_dim].
    """
    starts = batch.cu_seqlens_q.tolist()
    seq_lens = batch.seq_lens.tolist()
    ones = _leading_decodes(starts)
    parts = [_decode(q[:ones], kv_cache_layer, batch, max(seq_lens[:ones]), scale)] if ones else []
    for row in range(ones, len(seq_lens)):
        tokens = q[starts[row] : starts[row + 1]]
        parts.append(_prefill(tokens, kv_cache_layer, batch.block_table[row], seq_lens[row], scale))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)


def _leading_decodes(starts: list[int]) -> int:
    """How many rows at the head of the batch have one token each: they run as one."""
    count = 0
    while count < len(starts) - 1 and starts[count + 1] - starts[count] == 1:
        count += 1
    return count


def _decode(
    q: torch.Tensor, kv_cache_layer: torch.Tensor, batch: TokenBatch, longest: int, scale: float
) -> torch.Tensor:
    """Rows of one token each, padded to the longest context. q: [num_rows, num_heads, head_dim]."""
    num_rows, num_heads, head_dim = q.shape
    block_size, num_kv_heads = kv_cache_layer.shape[2:4]
    blocks = batch.block_table[:num_rows, : -(-longest // block_size)]
    # [num_rows, num_kv_heads, context, head_dim]; heads that share KV are the rows of one small product.
    keys, values = (part[blocks].flatten(1, 2).transpose(1, 2) for part in kv_cache_layer)
    context = torch.arange(keys.shape[2], device=q.device)
    mask = (context < batch.seq_lens[:num_rows, None])[:, None, None]
    grouped = q.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(num_rows, num_heads, head_dim)


def _prefill(
    q: torch.Tensor, kv_cache_layer: torch.Tensor, block_table: torch.Tensor, seq_len: int, scale: float
) -> torch.Tensor:
    """The last len(q) tokens of one row of seq_len tokens. q: [num_tokens, num_heads, head_dim]."""
    num_tokens, num_heads = q.shape[:2]
    block_size, num_kv_heads = kv_cache_layer.shape[2:4]
    blocks = block_table[: -(-seq_len // block_size)]
    keys, values = (part[blocks].flatten(0, 1)[:seq_len].transpose(0, 1) for part in kv_cache_layer)
    group = num_heads // num_kv_heads
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    mask = torch.ones(num_tokens, seq_len, dtype=torch.bool, device=q.device).tril_(seq_len - num_tokens)
    out = F.scaled_dot_product_attention(q.transpose(0, 1), keys, values, attn_mask=mask, scale=scale)
    return out.transpose(0, 1)
