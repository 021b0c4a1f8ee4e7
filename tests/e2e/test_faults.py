"""One rank's death is everybody's: kill -9, an exception, a refusal, Ctrl-C, at a step of a running decode.

The promise: the job ends with a non-zero code within LIMIT_S, leaves no process and no shared-memory file,
and an exception's message names rank, host and step.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import launchers
from tests.checkpoints import make_llama

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(180)]

LIMIT_S = 10.0
START_S = 90.0  # four interpreters that import torch, on a busy machine
LOOP = "tests/e2e/decode_loop.py"
DECODING = '"token_ids": ['  # in what generate streams
RANK_VARIABLE = re.compile(rb"(?:OMPI_COMM_WORLD_RANK|PMI_RANK)=(\d+)")


@dataclass(frozen=True)
class Target:
    """A running job, found in /proc by a variable that all of its processes inherit."""

    job: launchers.Job
    marker: bytes

    def processes(self) -> dict[int, int | None]:
        """pid → rank of every living process of the job; None for mpirun and its kin."""
        found: dict[int, int | None] = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            environ = read_proc(path)
            if self.marker in environ:
                match = RANK_VARIABLE.search(environ)
                found[int(path.parent.name)] = int(match[1]) if match else None
        return found

    def pid(self, rank: int) -> int:
        return next(pid for pid, other in self.processes().items() if other == rank)

    def files(self) -> set[Path]:
        """Shared-memory and session files that the ranks have mapped, with or without a name."""
        places = ("/dev/shm/", tempfile.gettempdir())
        files = set()
        for pid, rank in self.processes().items():
            maps = read_proc(Path(f"/proc/{pid}/maps")).decode() if rank is not None else ""
            paths = (line.split(maxsplit=5)[-1].removesuffix(" (deleted)") for line in maps.splitlines())
            files |= {Path(path) for path in paths if path.startswith(places) and ".so" not in path}
        return files

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + START_S
        while text not in self.job.output():
            assert self.job.process.poll() is None and time.monotonic() < deadline, self.job.output()
            time.sleep(0.02)


def read_proc(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # it ended meanwhile, or is not ours
        return b""


@pytest.fixture(scope="module")
def generate(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """What python gets for a `distllm generate` of four ranks that goes on for minutes."""
    folder = tmp_path_factory.mktemp("models") / "long"
    make_llama(folder, max_position_embeddings=60_000)
    layout = ("-tp", 2, "-pp", 2, "--prompt-token-ids", "5,7,9")
    return (
        "-m",
        "distllm",
        "generate",
        folder,
        *layout,
        "--max-tokens",
        50_000,
        "--ignore-eos",
        "--stream",
        "--json",
    )


@contextmanager
def running(name: str, args: Sequence[object], ready: str, **extra: str) -> Iterator[Target]:
    """A job of four ranks whose output has come to `ready`."""
    marker = uuid.uuid4().hex
    with launchers.launcher(name).start(4, *args, DISTLLM_TEST_JOB=marker, **extra) as job:
        target = Target(job, f"DISTLLM_TEST_JOB={marker}".encode())
        target.wait_for(ready)
        yield target


def decode_loop(name: str, *fault: object) -> AbstractContextManager[Target]:
    """The loop with an injected fault, at step 10."""
    return running(name, (LOOP, 100_000, *fault), "step 10\n")


def check_ends(target: Target, harm: Callable[[], object]) -> str:
    """Do the harm, and hold the job to the promise. Returns its output."""
    files, start = target.files(), time.monotonic()
    harm()
    code = target.job.wait(LIMIT_S)
    while target.processes() and time.monotonic() < start + LIMIT_S:
        time.sleep(0.05)
    print(f"over after {time.monotonic() - start:.1f} s with code {code}; {len(files)} files watched")
    assert code != 0, target.job.output()
    assert not target.processes(), "processes outlived the job"
    assert files, "a job of several ranks has shared memory"
    assert not [path for path in files if path.exists()], "files outlived the job"
    return target.job.output()


def where(rank: int, step: int) -> str:
    return f"[rank {rank} host {socket.gethostname()} step {step}]"


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("name", launchers.NAMES)
def test_kill_any_rank(generate: Sequence[object], name: str, rank: int) -> None:
    with running(name, generate, DECODING) as target:
        check_ends(target, lambda: os.kill(target.pid(rank), signal.SIGKILL))


@pytest.mark.parametrize("whole_terminal", [True, False], ids=["terminal", "mpirun-only"])
@pytest.mark.parametrize("name", launchers.NAMES)
def test_interrupt(generate: Sequence[object], name: str, whole_terminal: bool) -> None:
    with running(name, generate, DECODING) as target:
        pid = target.job.process.pid
        output = check_ends(target, lambda: (os.killpg if whole_terminal else os.kill)(pid, signal.SIGINT))
        assert "Traceback" not in output


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("name", launchers.NAMES)
def test_exception(name: str, rank: int) -> None:
    with decode_loop(name, "raise", rank, 60) as target:
        output = check_ends(target, lambda: None)
        assert f"{where(rank, 60)} RuntimeError: injected failure" in output


@pytest.mark.parametrize("name", launchers.NAMES)
def test_refusal_by_all_is_one_line(name: str) -> None:
    with decode_loop(name, "refuse", -1, 60) as target:
        output = check_ends(target, lambda: None)
        assert target.job.process.returncode == 2
        assert output.count("injected refusal") == 1 and "\ndistllm: error: injected refusal\n" in output
        assert "Traceback" not in output and "MPI_ABORT" not in output.upper()


@pytest.mark.parametrize("name", launchers.NAMES)
def test_refusal_by_one_names_it(name: str) -> None:
    with decode_loop(name, "refuse", 3, 60) as target:
        output = check_ends(target, lambda: None)
        assert f"{where(3, 60)} distllm: error: injected refusal" in output


@pytest.mark.parametrize("name", launchers.NAMES)
def test_root_leaves_idle_ranks(name: str) -> None:
    """Ranks that wait for work, without a deadline, learn that rank 0 is gone."""
    with decode_loop(name, "wait", -1, 60) as target:
        output = check_ends(target, lambda: None)
        assert "CommError: rank 0 left the job" in output


@pytest.mark.parametrize("name", launchers.NAMES)
def test_stuck_rank_is_a_timeout(generate: Sequence[object], name: str) -> None:
    """No launcher notices a stopped process; the deadline of the others does."""
    with running(name, generate, DECODING, DISTLLM_TIMEOUT_S="4") as target:
        output = check_ends(target, lambda: os.kill(target.pid(1), signal.SIGSTOP))
        where = rf"\[rank \d host {socket.gethostname()} step \d+\]"
        assert re.search(
            rf"{where} .*CommTimeout: .* on (tp|pipe|tokens) \(rank \d of \d, .*\): .* 4 s", output
        )
