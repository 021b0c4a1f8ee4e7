"""`bench kernels`: each operation of a step at the shapes of a model, beside what its bytes or its arithmetic
would take at the ceilings measured in the same run. One process, no communicator.

Weights and KV are cold, as in a step: several copies are used in turn. Activations are warm, as in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from distllm.engine import read_spec, resolve_model
from distllm.engine.dtypes import torch_dtype
from distllm.models.shards import check_layout
from distllm.models.spec import DecoderSpec, DType
from distllm.ops.bench.ceilings import measure_ceilings
from distllm.ops.bench.floors import Ceilings
from distllm.ops.bench.kernel_cases import Case, StepCases
from distllm.ops.bench.timing import Summary, time_calls
from distllm.parallel.layout import RankLayout

COLD_BYTES = 2**27  # more than a last-level cache holds
MAX_COPIES = 32


@dataclass(frozen=True)
class KernelResult:
    operation: str
    shape: str
    time_s: Summary
    bytes_per_s: float
    flop_per_s: float
    floor_s: float
    ceiling_percent: float


def run_kernels(
    model: str,
    tp_size: int,
    dtype: str,
    batch_sizes: Sequence[int],
    context_len: int,
    input_lens: Sequence[int],
) -> tuple[Ceilings, list[KernelResult]]:
    """A decode step of each batch size, and the prefill of each prompt length. dtype: as in EngineConfig."""
    spec = read_spec(resolve_model(model))
    check_layout(spec, RankLayout(tp_size))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = _resolve_dtype(dtype, spec, device)
    ceilings = measure_ceilings(device, values)
    steps = StepCases(spec, tp_size, values, device)
    cases = [case for rows in batch_sizes for case in steps.decode(rows, context_len)]
    cases += [case for length in input_lens for case in steps.prefill(length)]
    return ceilings, [run_case(case, device, ceilings) for case in cases]


def _resolve_dtype(name: str, spec: DecoderSpec, device: torch.device) -> torch.dtype:
    """auto: the checkpoint's on a GPU, float32 on a CPU."""
    if name == "auto":
        name = spec.dtype if device.type == "cuda" else "float32"
    return torch_dtype(cast(DType, name))


@torch.inference_mode()
def run_case(case: Case, device: torch.device, ceilings: Ceilings) -> KernelResult:
    copies = min(MAX_COPIES, 1 + COLD_BYTES // case.num_bytes)
    time = time_calls([case.make() for _ in range(copies)], device)
    floor = ceilings.least_s(case.num_bytes, case.num_flop)
    return KernelResult(
        operation=case.operation,
        shape=case.shape,
        time_s=time,
        bytes_per_s=case.num_bytes / time.median,
        flop_per_s=case.num_flop / time.median,
        floor_s=floor,
        ceiling_percent=100 * floor / time.median,
    )
