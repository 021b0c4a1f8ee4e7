"""How many KV blocks each rank holds: the same number everywhere, the least that any rank has room for."""

from __future__ import annotations

import gc
import json

import torch

from distllm.comm.base import Control
from distllm.config import EngineConfig
from distllm.errors import ConfigError
from distllm.models.spec import DecoderSpec

CPU_LIMIT_BYTES = 2**30  # per rank, where kv_cache_memory_bytes is not given
GRAPH_BYTES = 2**30  # captured steps keep their intermediate tensors


def kv_block_count(
    config: EngineConfig, spec: DecoderSpec, block_bytes: int, control: Control, device: torch.device
) -> int:
    """Blocks that fit on every rank. block_bytes: of one block on this rank, all layers of its stage.

    Collective: every rank of control, with its weights loaded. Raises ConfigError (on all) if one sequence of
    max_model_len does not fit.
    """
    per_seq = -(-config.context_len // config.block_size)
    room = config.kv_cache_memory_bytes or _free_bytes(config, spec, device)
    mine = room // block_bytes
    if not config.kv_cache_memory_bytes:
        mine = min(mine, config.max_num_seqs * per_seq)
    offer = json.dumps([mine, block_bytes]).encode()
    counts, sizes = zip(*map(json.loads, control.all_gather_bytes(offer)), strict=True)
    num_blocks = min(counts)
    if num_blocks < per_seq:
        wanted = per_seq * max(sizes)  # stages differ in size: all ranks name the largest
        raise ConfigError(
            f"the KV cache holds {num_blocks * config.block_size} tokens, fewer than max_model_len "
            f"{config.context_len}: raise kv_cache_memory_bytes to {wanted} or lower "
            "max_model_len"
        )
    return num_blocks


def _free_bytes(config: EngineConfig, spec: DecoderSpec, device: torch.device) -> int:
    """What is left of this rank's share of the device after weights, the largest step and the graphs."""
    if device.type != "cuda":
        return CPU_LIMIT_BYTES
    gc.collect()  # what engines held that are closed
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    used = total - free
    graphs = 0 if config.enforce_eager else GRAPH_BYTES
    return max(0, int(total * config.gpu_memory_utilization) - used - graphs - _step_bytes(config, spec))


def _step_bytes(config: EngineConfig, spec: DecoderSpec) -> int:
    """Upper bound of a step's tensors: some hidden states and one MLP of every token, or what its experts
    make of it; logits of every row.
    """
    per_token = 2 * (8 * spec.hidden_size + 3 * spec.intermediate_size)
    if spec.moe is not None:  # their outputs are in fp32 until they are summed
        per_token += spec.moe.top_k * (4 * spec.hidden_size + 2 * spec.moe.intermediate_size)
    # Logits of this rank, of all, masked; for LogitControls at once fp32 three times, a bit in a byte.
    per_row = (3 * 2 + 3 * 4 + 1) * spec.vocab_size
    drafts = config.speculation.num_speculative_tokens if config.speculation else 0
    num_rows = min(config.max_num_seqs * (1 + drafts), config.max_num_batched_tokens)
    return config.max_num_batched_tokens * per_token + num_rows * per_row


def allocate_kv_cache(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The KV cache of one rank. Zeroed: attention multiplies unwritten places by zero, and 0 · NaN is NaN."""
    return torch.zeros(shape, dtype=dtype, device=device)
