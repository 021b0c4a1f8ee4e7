"""The engine that a benchmark runs: opened as the peers are measured, and its floors on this device."""

from __future__ import annotations

from typing import Any

from distllm.errors import ConfigError
from distllm.ops.bench.ceilings import measure_ceilings
from distllm.ops.bench.floors import Floors, stage_costs
from distllm.runtime.llm import LLM


def open_engine(model: str, needed_len: int, options: dict[str, Any]) -> LLM:
    """Prefix caching off, and room for sequences of needed_len tokens. Collective: every rank of the job."""
    max_model_len = options["max_model_len"] or needed_len
    if max_model_len < needed_len:  # sequences would end early, and the times mean nothing
        raise ConfigError(
            f"max_model_len is {max_model_len}; this workload has sequences of {needed_len} tokens: "
            "raise --max-model-len or leave it out"
        )
    return LLM(model, enable_prefix_caching=False, **{**options, "max_model_len": max_model_len})


def measure_floors(llm: LLM) -> Floors:
    """Every rank measures its device, all at once: what they share is shared when the engine runs too."""
    config = llm.config
    costs = stage_costs(
        llm.spec, config.tensor_parallel_size, config.pipeline_parallel_size, llm.dtype.itemsize
    )
    return Floors(costs, measure_ceilings(llm.device, llm.dtype))
