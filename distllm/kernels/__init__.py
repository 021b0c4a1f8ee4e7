"""The operations of a step, one function each. Knows tensors; never layers, ranks or requests.

Callers import from here. On a GPU a Triton kernel runs, elsewhere the plain torch reference: chosen in this
file, by where the first argument lies. Contracts stand at the references.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import torch

from distllm.kernels.reference import (
    activation,
    attention,
    embedding,
    experts,
    gather,
    logprobs,
    masks,
    norm,
    penalties,
    rope,
    sampling,
    truncation,
    typical,
)
from distllm.kernels.reference import linear as linears

P = ParamSpec("P")
R = TypeVar("R")


@cache
def _triton(module: str, name: str) -> Callable[..., Any]:
    """Loaded on first use: a machine without a GPU needs no Triton."""
    return getattr(import_module(f"distllm.kernels.triton.{module}"), name)


def _by_device(reference: Callable[P, R]) -> Callable[P, R]:
    module, name = reference.__module__.rsplit(".", 1)[1], reference.__name__

    @wraps(reference)
    def operation(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, torch.Tensor), "the first argument decides the device"
        return (_triton(module, name) if first.is_cuda else reference)(*args, **kwargs)

    return operation


def compile_together() -> AbstractContextManager[None]:
    """On a GPU only: see triton/compile.py."""
    manager: AbstractContextManager[None] = _triton("compile", "compile_together")()
    return manager


activate = _by_device(activation.activate)
activate_mul = _by_device(activation.activate_mul)
add_rms_norm = _by_device(norm.add_rms_norm)
best_tokens = _by_device(sampling.best_tokens)
choose_best = _by_device(sampling.choose_best)
embed = embedding.embed
expert_mlp = _by_device(experts.expert_mlp)
gather_batch = _by_device(gather.gather_batch)
keep_typical = _by_device(typical.keep_typical)
layer_norm = _by_device(norm.layer_norm)
linear = _by_device(linears.linear)
linear_activate_mul = _by_device(linears.linear_activate_mul)
linear_add = _by_device(linears.linear_add)
lowest_kept = _by_device(truncation.lowest_kept)
mask_logits = _by_device(masks.mask_logits)
paged_attention = _by_device(attention.paged_attention)
penalize = _by_device(penalties.penalize)
rms_norm = _by_device(norm.rms_norm)
rope_and_cache_kv = _by_device(rope.rope_and_cache_kv)
rope_cos_sin = _by_device(rope.rope_cos_sin)
route = experts.route
sample_tokens = _by_device(sampling.sample_tokens)
token_logprobs = _by_device(logprobs.token_logprobs)
