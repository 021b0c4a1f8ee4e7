"""An mpi4py communicator of the caller's, under both MPIs."""

from __future__ import annotations

import pytest

from distllm import LLM, SamplingParams
from tests import launchers

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("name", launchers.NAMES)
def test_engines_on_halves_of_the_world(name: str) -> None:
    with LLM("demo") as llm:
        prompt, params = "Once upon a time", SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        alone = llm.generate(prompt, params)[0].outputs[0]
    code, output = launchers.launcher(name).run(4, "tests/mpi/run_llm_comm.py", timeout_s=110)
    assert code == 0, output
    assert output.count(" ".join(map(str, ("tokens", *alone.token_ids)))) == 2, output
