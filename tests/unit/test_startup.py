"""What importing distllm and asking for help do not do: torch, MPI and the tokenizer library stay out."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

HEAVY = {"torch", "mpi4py", "tokenizers", "safetensors", "transformers", "rich", "numpy", "asyncio"}

PLAIN = (
    "request", "block_manager", "scheduler", "plan", "plan_codec", "outputs", "sampling.sampling_params",
    "sampling.logit_controls", "beams.beam_search", "beams.beam_search_params", "beams.beam_rows",
    "beams.group_search",
    "structured.structured_outputs", "structured.constraint", "structured.grammar_trial",
)  # fmt: skip

REPORT = """
import json, sys, threading
{code}
print(json.dumps([sorted({{name.split(".")[0] for name in sys.modules}}), threading.active_count()]))
"""


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code: str) -> set[str]:
    modules, num_threads = json.loads(run_python(REPORT.format(code=code)).splitlines()[-1])
    assert num_threads == 1
    return set(modules)


def best_of_three_s(*args: str) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, *args], capture_output=True, timeout=60, check=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_import_loads_nothing_heavy() -> None:
    assert not loaded_by("import distllm") & HEAVY


def test_help_loads_nothing_heavy() -> None:
    code = "from distllm.cli.main import cli; cli.main(['generate', '-h'], standalone_mode=False)"
    assert not loaded_by(code) & HEAVY


def test_models_load_nothing_heavy() -> None:
    code = "from distllm.cli.main import cli; cli.main(['models'], standalone_mode=False)"
    assert not loaded_by(code) & HEAVY


def test_plain_python_half_of_the_runtime_loads_no_torch() -> None:
    modules = ", ".join(f"distllm.runtime.{name}" for name in PLAIN)
    assert not loaded_by(f"import {modules}") & HEAVY - {"numpy"}


def test_llm_is_loaded_on_first_use_and_starts_no_mpi() -> None:
    loaded = loaded_by("import distllm, distllm.engine.build; assert distllm.LLM.__name__ == 'LLM'")
    assert "torch" in loaded and "mpi4py" not in loaded


def test_mpi_module_does_not_initialise_mpi() -> None:
    out = run_python(
        "from distllm.comm import mpi; mpi.library_version(); print(mpi._mpi().Is_initialized())"
    )
    assert out.strip() == "False"


def test_unknown_public_name_is_an_attribute_error() -> None:
    import distllm

    with pytest.raises(AttributeError, match="no attribute 'LLN'"):
        distllm.LLN  # noqa: B018
    assert all(hasattr(distllm, name) for name in distllm.__all__)


def test_import_takes_less_than_300_ms() -> None:
    took = best_of_three_s("-c", "import distllm") - best_of_three_s("-c", "pass")
    assert took < 0.3


def test_help_takes_less_than_500_ms() -> None:
    assert best_of_three_s("-m", "distllm", "--help") < 0.5
