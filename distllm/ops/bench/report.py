"""The file that a benchmark leaves: what ran, on what, and every raw measurement. Times are in seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distllm.ops.bench.environment import Facts, environment
from distllm.ops.bench.floors import Ceilings, Floors
from distllm.ops.bench.latency import LatencyWorkload
from distllm.ops.bench.throughput import ThroughputWorkload
from distllm.runtime.llm import LLM

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Report:
    """Made on rank 0 when the measurements are over."""

    benchmark: str  # latency, profile, throughput, comm, kernels
    command: str
    num_ranks: int
    options: dict[str, Any]  # of the engine and of the workload, defaults included
    ceilings: Ceilings | None
    results: Mapping[str, Sequence[Any]]  # dataclasses, by kind
    ready_s: float | None = None  # from the start of the command until the engine could run
    environment: Facts = field(default_factory=environment)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    format_version: int = FORMAT_VERSION

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def engine_report(
    benchmark: str,
    command: str,
    llm: LLM,
    ready_s: float,
    workload: LatencyWorkload | ThroughputWorkload,
    floors: Floors,
    results: Mapping[str, Sequence[Any]],
) -> Report:
    """Of a benchmark that ran an engine. The floors' inputs go along, so that anyone can check them."""
    options = {
        "engine": asdict(llm.config),
        "dtype": str(llm.dtype).removeprefix("torch."),
        "workload": asdict(workload),
        "stage_costs": [asdict(cost) for cost in floors.costs],
    }
    return Report(benchmark, command, llm.layout.world_size, options, floors.ceilings, results, ready_s)
