"""The engine on disk, and weights on their way from any model folder to the ranks. Knows no request.

The names below are what other rooms use. They are loaded on first use: reading a spec needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distllm.engine.build import build_engine
    from distllm.engine.load import load_weights
    from distllm.engine.resolve import eos_token_ids, read_generation_config, read_spec, resolve_model
    from distllm.engine.source import WeightSource, open_source

_HOMES = {
    "WeightSource": "source",
    "build_engine": "build",
    "eos_token_ids": "resolve",
    "load_weights": "load",
    "open_source": "source",
    "read_generation_config": "resolve",
    "read_spec": "resolve",
    "resolve_model": "resolve",
}

__all__ = [
    "WeightSource",
    "build_engine",
    "eos_token_ids",
    "load_weights",
    "open_source",
    "read_generation_config",
    "read_spec",
    "resolve_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
