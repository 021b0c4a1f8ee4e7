"""The engine on GPUs: every layout that fits, eager and captured, gives transformers' fp32 greedy tokens."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import launchers
from tests.gpu.conftest import num_gpus
from tests.gpu.engine_cases import make_case

pytestmark = pytest.mark.gpu

# How this machine tells Open MPI 4 that it has no ssh; the launcher's own variables stay out.
NO_SSH = {name: value for name, value in os.environ.items() if name.startswith("OMPI_MCA_plm")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_case(path)
    return path


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2)])
def test_tokens(folder: Path, tp: int, pp: int) -> None:
    if tp * pp > num_gpus():
        pytest.skip(f"{tp * pp} ranks need as many GPUs; there are {num_gpus()}")
    code, output = launchers.launcher("openmpi").run(
        tp * pp, "tests/gpu/run_llm.py", folder, tp, pp, timeout_s=170, **NO_SSH
    )
    assert code == 0 and f"tp {tp} pp {pp} passed" in output, output
