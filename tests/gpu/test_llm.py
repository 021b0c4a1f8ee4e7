"""The engine on GPUs: every layout that fits and every way to run a step give transformers' fp32 tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import launchers
from tests.decoding_matrix import make_models
from tests.draw_cases import check_layouts
from tests.gpu.conftest import needs_gpus, num_gpus
from tests.gpu.engine_cases import EXPERTS, make_case, make_trained_case
from tests.structured_cases import make_folder

pytestmark = pytest.mark.gpu

LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2)]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    make_case(path, "mixtral", **EXPERTS)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_case(path)
    make_trained_case(path)
    return path


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize(
    "script", ["run_llm.py", "run_trained.py", "run_beams.py", "run_speculation.py", "run_processors.py"]
)
def test_tokens(folder: Path, script: str, tp: int, pp: int) -> None:
    check(script, folder, tp, pp)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_tokens_of_experts(mixture: Path, tp: int, pp: int) -> None:
    """In a captured step the router chooses anew at each replay."""
    check("run_llm.py", mixture, tp, pp)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_structured_outputs(tmp_path: Path, tp: int, pp: int) -> None:
    check("run_structured.py", make_folder(tmp_path), tp, pp)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_decoding_matrix(tmp_path: Path, tp: int, pp: int) -> None:
    """Graphs beside every other feature."""
    check("run_matrix.py", make_models(tmp_path), tp, pp)


def check(script: str, folder: Path, tp: int, pp: int) -> None:
    needs_gpus(tp * pp)
    code, output = launchers.launcher("openmpi").run(
        tp * pp, f"tests/gpu/{script}", folder, tp, pp, timeout_s=280
    )
    assert code == 0 and f"tp {tp} pp {pp} on cuda passed" in output, output


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_soak(tp: int, pp: int) -> None:
    """As tests/e2e/test_soak.py, with captured steps and sums by peer memory."""
    needs_gpus(tp * pp)
    args = ("-tp", tp, "-pp", pp, "--dtype", "bfloat16", "--requests", 1000, "--wave", 50)
    code, output = launchers.launcher("openmpi").run(tp * pp, "tests/e2e/run_soak.py", *args, timeout_s=280)
    assert code == 0 and f"tp {tp} pp {pp}: passed" in output, output


@pytest.mark.timeout(400)
def test_draws(tmp_path: Path) -> None:
    """Sampled tokens follow the distribution: plain ones in captured steps, the others behind them."""
    check_layouts(tmp_path, [tp for tp in (1, 2, 4) if tp <= num_gpus()], "cuda")
