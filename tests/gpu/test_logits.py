"""Logits on GPUs against transformers on the same GPU: prompts, chunks, decode steps, kernels, all-reduce.

We may be off from fp64 by as much as transformers in the same dtype, and a little.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import launchers
from tests.gpu.conftest import num_gpus
from tests.gpu.logit_cases import ALLOWED, VARIANTS, check, logits_file, make_case, read_logits

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)]


@pytest.mark.parametrize("name", VARIANTS)
def test_logits(name: str, tmp_path: Path) -> None:
    """In every layout that there are GPUs for; a folder is made once for all of them."""
    case = make_case(tmp_path, name, torch.device("cuda"))
    for tp, pp in LAYOUTS:
        if tp * pp > num_gpus():
            continue
        code, output = launchers.launcher("openmpi").run(
            tp * pp, "tests/gpu/run_logits.py", tmp_path, tp, pp, timeout_s=250
        )
        assert code == 0, output
        for dtype in ALLOWED:
            logits = read_logits(logits_file(tmp_path, tp, pp, dtype))
            check(case, logits, dtype, f"tp {tp} pp {pp} {dtype}")
