"""The operations of a step, one function each. Knows tensors; never layers, ranks or requests.

Callers import from here: which implementation runs is decided in this file, by device. Today it is the plain
torch reference, on any device.
"""

from distllm.kernels.reference.activation import silu_mul
from distllm.kernels.reference.attention import paged_attention
from distllm.kernels.reference.embedding import embed
from distllm.kernels.reference.gather import gather_batch
from distllm.kernels.reference.norm import add_rms_norm, rms_norm
from distllm.kernels.reference.rope import rope_and_cache_kv
from distllm.kernels.reference.sampling import sample_tokens, token_logprobs

__all__ = [
    "add_rms_norm",
    "embed",
    "gather_batch",
    "paged_attention",
    "rms_norm",
    "rope_and_cache_kv",
    "sample_tokens",
    "silu_mul",
    "token_logprobs",
]
