"""The public names of distllm. Importing it starts nothing: no torch, no MPI, no device.

`LLM` alone brings torch, so it is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distllm.errors import (
    CheckpointError,
    CommError,
    CommTimeout,
    ConfigError,
    DistllmError,
    LaunchError,
    LayoutError,
    RequestError,
    UserError,
)
from distllm.runtime.beams.beam_search_params import BeamSearchParams
from distllm.runtime.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    CompletionOutput,
    Logprob,
    RequestOutput,
    ScoreOutput,
)
from distllm.runtime.sampling.sampling_params import SamplingParams
from distllm.runtime.structured.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from distllm.runtime.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CheckpointError",
    "CommError",
    "CommTimeout",
    "CompletionOutput",
    "ConfigError",
    "DistllmError",
    "LaunchError",
    "LayoutError",
    "Logprob",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "ScoreOutput",
    "StructuredOutputsParams",
    "UserError",
]


def __getattr__(name: str) -> Any:
    if name != "LLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from distllm.runtime.llm import LLM

    return LLM
