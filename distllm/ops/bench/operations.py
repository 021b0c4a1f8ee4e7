"""Which operation of a step a kernel belongs to, and the least time that the operation could take.

Knows the names of kernels, the order of a decoder's linears, and kernel_cases. A kernel that nobody knows has
no operation, and no floor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from distllm.models.shards import layer_linears, stage_layers
from distllm.models.spec import DecoderSpec
from distllm.ops.bench.floors import Ceilings
from distllm.ops.bench.kernel_cases import Case
from distllm.parallel.layout import RankLayout

LINEAR = "linear"

# The first pattern that a kernel's whole name contains; operations as in kernel_cases.
PATTERNS = (
    (r"gemv|gemm|nvjet|xmma|cutlass|^_gated_kernel|^aten::linear$", LINEAR),
    (r"^_decode_kernel|^_prefill_kernel|attention", "paged_attention"),
    (r"^_rms_norm_kernel", "rms_norm"),
    (r"^_layer_norm_kernel", "layer_norm"),
    (r"^_activation_kernel", "activation"),
    (r"^_rope_kernel", "rope_and_cache_kv"),
    (r"^_gather_kernel", "gather_batch"),
    (r"^_best_of_piece_kernel", "sample_tokens"),
    (r"^aten::embedding$", "embed"),
)


def stage_linears(spec: DecoderSpec, layout: RankLayout) -> list[str]:
    """The linears of a step of this stage, in the order in which they run."""
    head = ["head"] if layout.is_last_stage else []
    return [*(name for layer in stage_layers(spec, layout) for name in layer_linears(spec, layer)), *head]


def operations(kernels: Sequence[str], linears: Sequence[str]) -> list[str]:
    """The operation of each kernel of a step, in order; empty where it is unknown.

    Products of different shapes may share one kernel, so linears are told apart by their order, and only if
    there are as many kernels as linears.
    """
    found = [_operation(name) for name in kernels]
    places = [place for place, operation in enumerate(found) if operation == LINEAR]
    if len(places) == len(linears):
        for place, linear in zip(places, linears, strict=True):
            found[place] = f"{LINEAR} {linear}"
    return found


def _operation(kernel: str) -> str:
    return next((name for pattern, name in PATTERNS if re.search(pattern, kernel, re.IGNORECASE)), "")


def floors_s(cases: Iterable[Case], ceilings: Ceilings) -> dict[str, float]:
    """Seconds of one call of each operation at the ceilings; of several cases the last counts."""
    return {case.operation: ceilings.least_s(case.num_bytes, case.num_flop) for case in cases}
