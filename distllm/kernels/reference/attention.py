"""Causal attention of ragged rows over the paged KV cache: prefill, chunks and decode in one operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from distllm.kernels.batch import TokenBatch

Attend = Callable[..., torch.Tensor]  # _attend with the knobs of the layer


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
    """softmax(scores) v, where a token at position p sees positions 0 … p of its own row.

    The scores are scale · q kᵀ; with a softcap, softcap · tanh(scores / softcap); with alibi_slopes
    [num_heads] fp32, less slope · distance, of positions. With a window only the last `window` of the
    positions 0 … p are seen.

    q: [num_tokens, num_heads, head_dim]; num_heads is a multiple of num_kv_heads, and consecutive heads
    share a KV head. kv_cache_layer: [2, num_blocks, block_size, num_kv_heads, head_dim]; this step's KV is
    already in it. Every row has at least one token. Returns [num_tokens, num_heads · head_dim].
    """
    starts = batch.cu_seqlens_q.tolist()
    seq_lens = batch.seq_lens.tolist()
    ones = batch.num_decodes if batch.decode_len == 1 else 0
    attend = partial(_attend, scale=scale, window=window, softcap=softcap)
    slopes = alibi_slopes
    parts = [_decode(q[:ones], kv_cache_layer, batch, max(seq_lens[:ones]), slopes, attend)] if ones else []
    for row in range(ones, len(seq_lens)):
        tokens, blocks = q[starts[row] : starts[row + 1]], batch.block_table[row]
        parts.append(_prefill(tokens, kv_cache_layer, blocks, seq_lens[row], slopes, attend))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)


def _decode(
    q: torch.Tensor,
    kv_cache_layer: torch.Tensor,
    batch: TokenBatch,
    longest: int,
    slopes: torch.Tensor | None,
    attend: Attend,
) -> torch.Tensor:
    """Rows of one token each, padded to the longest context. q: [num_rows, num_heads, head_dim]."""
    num_rows, num_heads, head_dim = q.shape
    block_size, num_kv_heads = kv_cache_layer.shape[2:4]
    blocks = batch.block_table[:num_rows, : -(-longest // block_size)]
    # [num_rows, num_kv_heads, context, head_dim]; heads that share KV are the rows of one small product.
    keys, values = (part[blocks].flatten(1, 2).transpose(1, 2) for part in kv_cache_layer)
    grouped = q.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    slopes = None if slopes is None else slopes.view(num_kv_heads, -1, 1)
    out = attend(grouped, keys, values, batch.seq_lens[:num_rows, None, None, None] - 1, slopes)
    return out.reshape(num_rows, num_heads, head_dim)


def _prefill(
    q: torch.Tensor,
    kv_cache_layer: torch.Tensor,
    block_table: torch.Tensor,
    seq_len: int,
    slopes: torch.Tensor | None,
    attend: Attend,
) -> torch.Tensor:
    """The last len(q) tokens of one row of seq_len tokens. q: [num_tokens, num_heads, head_dim]."""
    num_tokens, num_heads = q.shape[:2]
    block_size, num_kv_heads = kv_cache_layer.shape[2:4]
    blocks = block_table[: -(-seq_len // block_size)]
    keys, values = (part[blocks].flatten(0, 1)[:seq_len].transpose(0, 1) for part in kv_cache_layer)
    group = num_heads // num_kv_heads
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    positions = torch.arange(seq_len - num_tokens, seq_len, device=q.device)[:, None]
    slopes = None if slopes is None else slopes.view(-1, 1, 1)
    return attend(q.transpose(0, 1), keys, values, positions, slopes).transpose(0, 1)


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    slopes: torch.Tensor | None,
    *,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """q: [..., n, head_dim]; keys, values: [..., context, head_dim], from position 0 on; positions (of q) and
    slopes: as [..., n, 1].
    """
    distance = positions - torch.arange(keys.shape[-2], device=q.device)
    seen = distance >= 0
    if window:
        seen &= distance < window
    if not softcap and slopes is None:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=scale)
    scores = scale * (q.float() @ keys.float().mT)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores - slopes * distance
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values.float()).to(q.dtype)
