"""The commands on several ranks, under each MPI: the result of one rank, printed once; refusals said once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import launchers
from tests.command import distllm, without_log

pytestmark = pytest.mark.mpi

GENERATE = (
    "--prompt-token-ids",
    "5,6,7",
    "--prompt-token-ids",
    "9",
    "--temperature",
    "0",
    "--max-tokens",
    "6",
)


@pytest.fixture(params=launchers.NAMES)
def mpi(request: pytest.FixtureRequest) -> launchers.Launcher:
    return launchers.launcher(request.param)


def alone(*args: object) -> str:
    done = distllm(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_refused_once(done: tuple[int, str], *words: str) -> None:
    """The launcher ends with a failure, and of all ranks one said why, in one line."""
    code, output = done
    lines = [line for line in output.splitlines() if "distllm: error:" in line]
    assert code == 2 and len(lines) == 1 and "Traceback" not in output, output
    for word in words:
        assert word in lines[0], output


@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (1, 3), (2, 1)])
def test_ranks_print_once_what_one_rank_prints(mpi: launchers.Launcher, tiny: Path, tp: int, pp: int) -> None:
    sizes = ("-tp", tp, "-pp", pp)
    code, output = mpi.run(tp * pp, "-m", "distllm", "generate", tiny, *GENERATE, *sizes, timeout_s=100)
    assert code == 0, output
    assert without_log(output) == alone("generate", tiny, *GENERATE)


def test_any_number_of_ranks_builds_the_same_engine(
    mpi: launchers.Launcher, tiny: Path, tmp_path: Path
) -> None:
    built = ("-m", "distllm", "build", tiny, "-o", tmp_path / "by three", "-tp", 2, "-pp", 2)
    code, output = mpi.run(3, *built, timeout_s=100)
    assert code == 0 and output.count("built ") == 1, output
    alone("build", tiny, "-o", tmp_path / "by one", "-tp", 2, "-pp", 2)
    contents = [{f.name: f.read_bytes() for f in folder.iterdir()} for folder in sorted(tmp_path.iterdir())]
    assert len(contents) == 2 and contents[0] == contents[1]


def test_help_is_printed_once(mpi: launchers.Launcher) -> None:
    code, output = mpi.run(3, "-m", "distllm", "--help")
    assert code == 0 and output.count("Usage:") == 1, output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--promt", "x"], ["--promt"]),
        (["--temperature", "-1", "-tp", "3"], ["temperature is -1.0"]),
        (["--prompt-token-ids", "131", "-pp", "3"], ["131", "130"]),
        (["-tp", "2"], ["tp 2 × pp 1 = 2 ranks", "3 ranks were started"]),
        (["-tp", "3"], ["tp 3", "8 attention heads"]),
    ],
    ids=["usage", "parameter", "prompt", "world size", "heads"],
)
def test_refused_once(mpi: launchers.Launcher, tiny: Path, args: list[str], words: list[str]) -> None:
    command = ("-m", "distllm", "generate", tiny, "--prompt-token-ids", "5", *args)
    check_refused_once(mpi.run(3, *command, timeout_s=100), *words)


def test_missing_folder_is_refused_once(mpi: launchers.Launcher, tmp_path: Path) -> None:
    command = ("-m", "distllm", "generate", tmp_path / "nowhere", "--prompt", "x", "-pp", "3")
    check_refused_once(mpi.run(3, *command, timeout_s=100), "nowhere")
