"""How many KV blocks each rank holds: the same number everywhere, the least that any rank has room for."""

from __future__ import annotations

import torch

from distllm.comm.base import Control
from distllm.config import EngineConfig
from distllm.errors import ConfigError

DEFAULT_LIMIT_BYTES = 2**30  # per rank, where kv_cache_memory_bytes is not given


def kv_block_count(config: EngineConfig, block_bytes: int, control: Control) -> int:
    """Blocks that fit on every rank. block_bytes: of one block on this rank, all layers of its stage.

    Collective: every rank of control. Raises ConfigError (on all) if one sequence of max_model_len does not
    fit.
    """
    per_seq = -(-config.context_len // config.block_size)
    wanted = config.max_num_seqs * per_seq
    limit = (config.kv_cache_memory_bytes or DEFAULT_LIMIT_BYTES) // block_bytes
    mine = limit if config.kv_cache_memory_bytes else min(wanted, limit)
    num_blocks = min(int(count) for count in control.all_gather_bytes(str(mine).encode()))
    if num_blocks < per_seq:
        raise ConfigError(
            f"the KV cache holds {num_blocks * config.block_size} tokens, fewer than max_model_len "
            f"{config.context_len}: raise kv_cache_memory_bytes to {per_seq * block_bytes} or lower "
            "max_model_len"
        )
    return num_blocks


def allocate_kv_cache(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The KV cache of one rank. Zeroed: the pages exist before the first step needs them."""
    return torch.zeros(shape, dtype=dtype, device=device)
