"""Which transport a job gets, and what a launch that cannot work says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from distllm.comm.connect import open_channels, open_control
from distllm.comm.local import LocalControl, run_ranks
from distllm.comm.mpi import check_world
from distllm.comm.shared_memory import MPICH, attached_files
from distllm.env import LauncherIdentity
from distllm.errors import LaunchError
from distllm.parallel.layout import RankLayout
from tests.launchers import FOREIGN, ROOT, clean_environ


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in os.environ:
        if name.startswith(FOREIGN):
            monkeypatch.delenv(name)


def test_one_rank_needs_no_mpi() -> None:
    code = (
        "import sys; from distllm.comm.connect import *; assert open_control().size == 1; print(*sys.modules)"
    )
    for environ in ({}, {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=clean_environ() | environ,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert not {"mpi4py", "torch"} & set(done.stdout.split())


def test_started_alone_says_how_to_start() -> None:
    with pytest.raises(LaunchError, match=r"4 ranks are wanted.*started alone.*mpirun -n 4"):
        open_control(world_size_wanted=4)


def test_given_ranks_are_used() -> None:
    assert run_ranks(2, lambda control: open_control(control, 2) is control) == [True, True]


@pytest.mark.parametrize(
    ("tp", "pp", "dp"), [(1, 1, 1), (2, 2, 1), (1, 4, 1), (3, 1, 1), (2, 1, 2), (1, 2, 2)]
)
def test_channels_follow_the_layout(tp: int, pp: int, dp: int) -> None:
    def run(control: LocalControl) -> None:
        import torch

        layout = RankLayout(tp, pp, dp, control.rank)
        channels = open_channels(control, layout)
        mine = torch.tensor(control.rank)
        assert channels.tp.all_gather(mine).tolist() == layout.tp_group
        assert channels.pipe.all_gather(mine).tolist() == layout.pp_group
        assert channels.tokens.all_gather(mine).tolist() == layout.pp_group
        assert (channels.tp.rank, channels.pipe.rank) == (layout.tp_rank, layout.pp_rank)
        channels.close()

    run_ranks(tp * pp * dp, run)


def test_a_world_of_singletons_is_refused() -> None:
    check_world(None, 1, "any")
    check_world(LauncherIdentity("srun", 2, 4, None), 4, "any")
    check_world(LauncherIdentity("a PMIx launcher", 2, None, None), 4, "any")
    with pytest.raises(LaunchError, match=r"srun started 4 ranks, .* world of 1: .*\(MPICH 5\).*--mpi=pmi2"):
        check_world(LauncherIdentity("srun", 2, 4, None), 1, "MPICH 5")


def test_only_segments_of_this_mpi_that_have_a_name_are_unlinked() -> None:
    maps = """\
7f00-7f01 rw-s 00000000 00:1a 7  /dev/shm/mpich_shm_1a_0
7f01-7f02 rw-s 00000000 00:1a 7  /dev/shm/mpich_shm_1a_0
7f02-7f03 rw-s 00000000 00:1a 8  /dev/shm/mpich_shm_1b_0 (deleted)
7f03-7f04 rw-s 00000000 00:1a 9  /dev/shm/somebody_else
7f04-7f05 rw-p 00000000 00:00 0
"""
    assert attached_files(maps, MPICH) == {"/dev/shm/mpich_shm_1a_0"}
