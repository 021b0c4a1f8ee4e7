"""Logits on GPUs against transformers on the same GPU: prompts, chunks, decode steps, kernels, all-reduce.

We may be off from fp64 by as much as transformers in the same dtype, and a little.
"""

from __future__ import annotations

import pytest
import torch

from tests import launchers
from tests.gpu.conftest import needs_gpus
from tests.gpu.logit_cases import ALLOWED, VARIANTS, Case, check, logits_file, make_case, read_logits

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("llamas")
    return {name: make_case(folder / name, name, torch.device("cuda")) for name in VARIANTS}


@pytest.fixture(scope="module", params=[(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)], ids=str)
def layout(request: pytest.FixtureRequest, cases: dict[str, Case]) -> tuple[int, int]:
    """One whose ranks have computed the logits of every case."""
    tp, pp = request.param
    needs_gpus(tp * pp)
    folder = next(iter(cases.values())).folder.parent
    code, output = launchers.launcher("openmpi").run(
        tp * pp, "tests/gpu/run_logits.py", folder, tp, pp, timeout_s=250
    )
    assert code == 0, output
    return tp, pp


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_logits(cases: dict[str, Case], layout: tuple[int, int], name: str, dtype: torch.dtype) -> None:
    check(cases[name], read_logits(logits_file(cases[name].folder, *layout, dtype)), dtype)
