"""Launches that are right, and launches that cannot work, as a user meets them."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import launchers

pytestmark = pytest.mark.mpi

WORLD = "tests/mpi/print_world.py"


@pytest.mark.parametrize("name", launchers.NAMES)
def test_world_and_identity_agree(name: str) -> None:
    code, output = launchers.launcher(name).run(3, WORLD)
    assert code == 0, output
    for rank in range(3):
        assert f"rank {rank} of 3, local {rank} of 3, launcher says {rank} of 3" in output


def mixed(mpirun_of: str, library_of: str) -> launchers.Launcher:
    variables = launchers.launcher(library_of).variables
    return dataclasses.replace(launchers.launcher(mpirun_of), variables=variables)


def test_mpich_launcher_with_open_mpi_library_is_one_clear_line() -> None:
    """Without the check this is three silent copies of "rank 0 of 1"."""
    before = set(Path("/dev/shm").iterdir())
    code, output = mixed("mpich", "openmpi").run(3, WORLD)
    left = {path for path in set(Path("/dev/shm").iterdir()) - before if path.name.endswith("0000.0")}
    assert not left, "a singleton's shared-memory file has job number 0 and rank 0"
    assert code == 2, output
    assert output.count("distllm: error: ") == 1 and "Traceback" not in output
    assert "started 3 ranks, but MPI sees a world of 1" in output and "Open MPI v" in output


def test_open_mpi_launcher_with_mpich_library_ends() -> None:
    """MPICH itself refuses, in MPI_Init."""
    code, output = mixed("openmpi", "mpich").run(3, WORLD)
    assert code != 0 and "PMI" in output, output


def test_too_many_or_too_few_ranks_is_one_line() -> None:
    code, output = launchers.launcher("openmpi").run(3, WORLD, 4)
    assert code == 2 and output.count("distllm: error: ") == 1, output
    assert "tp 4 × pp 1 = 4 ranks, but 3 ranks were started" in output


@pytest.mark.parametrize("args", [[], ["-n"], ["-n", "2"], ["--np", "2", "true"]])
def test_mpirun_script_usage(args: list[str]) -> None:
    done = subprocess.run(
        [launchers.ROOT / "launch/mpirun.sh", *args], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_mpirun_script_without_an_mpi() -> None:
    environ = launchers.clean_environ() | {"MPIRUN": "no-such-mpirun"}
    command = [launchers.ROOT / "launch/mpirun.sh", "-n", "2", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=environ)
    assert done.returncode == 2 and "cannot run 'no-such-mpirun'" in done.stderr


FAKE_MPIRUN = """#!/bin/sh
[ "$1" = --version ] && echo "mpirun (Open MPI) 4.1.6" || echo "plm=$OMPI_MCA_plm, arguments $*"
"""


@pytest.mark.parametrize(
    ("has_ssh", "hostfile", "set_by_user", "wanted"),
    [
        (False, [], {}, "^rsh"),
        (True, [], {}, ""),
        (False, ["--hostfile", "hosts"], {}, ""),
        (False, [], {"OMPI_MCA_plm": "slurm"}, "slurm"),
    ],
)
def test_mpirun_script_does_without_ssh_on_one_host(
    tmp_path: Path, has_ssh: bool, hostfile: list[str], set_by_user: dict[str, str], wanted: str
) -> None:
    """Open MPI 4 looks for ssh before it looks at where the ranks shall run."""
    (tmp_path / "mpirun").write_text(FAKE_MPIRUN)
    (tmp_path / "mpirun").chmod(0o755)
    for name in ("sh", "id", "getconf", *(["ssh"] if has_ssh else [])):
        (tmp_path / name).symlink_to(shutil.which(name) or "/bin/sh")
    command = ["/bin/sh", launchers.ROOT / "launch/mpirun.sh", "-n", "1", *hostfile, "true"]
    environ = {"PATH": str(tmp_path)} | set_by_user
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=environ)
    assert done.returncode == 0 and f"plm={wanted}, arguments -n 1" in done.stdout, done


def test_ranks_find_the_packages_that_the_tests_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/some/packages")
    path = launchers.launcher("openmpi").environ()["PYTHONPATH"]
    assert path == f"{launchers.ROOT}:/some/packages"
