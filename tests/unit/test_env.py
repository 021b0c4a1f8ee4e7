"""Whom we take ourselves for, under the variables that each launcher was seen to set."""

from __future__ import annotations

import pytest

from distllm.env import LauncherIdentity, launcher_identity, timeout_s
from distllm.errors import ConfigError

SLURM_BATCH_SHELL = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
SLURM_STEP = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}


@pytest.mark.parametrize(
    ("environ", "identity"),
    [
        ({}, None),
        (SLURM_BATCH_SHELL, None),
        (SLURM_STEP, LauncherIdentity("srun", 1, 4, 1)),
        (OPEN_MPI | {"PMIX_RANK": "3"}, LauncherIdentity("Open MPI mpirun", 3, 8, 1)),
        (HYDRA, LauncherIdentity("mpiexec (PMI)", 2, 4, 0)),
        (OPEN_MPI | SLURM_STEP, LauncherIdentity("Open MPI mpirun", 3, 8, 1)),
        (HYDRA | SLURM_STEP, LauncherIdentity("mpiexec (PMI)", 2, 4, 0)),
        (SLURM_STEP | {"PMIX_RANK": "1"}, LauncherIdentity("srun", 1, 4, 1)),
        ({"PMIX_RANK": "5"}, LauncherIdentity("a PMIx launcher", 5, None, None)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "x"}, None),
    ],
)
def test_identity(environ: dict[str, str], identity: LauncherIdentity | None) -> None:
    assert launcher_identity(environ) == identity


def test_timeout() -> None:
    assert timeout_s({}) == 300
    assert timeout_s({"DISTLLM_TIMEOUT_S": "2.5"}) == 2.5
    for text in ("0", "-1", "soon", "nan", "inf", ""):
        with pytest.raises(ConfigError, match=r"DISTLLM_TIMEOUT_S is '.*'; it must be a positive number"):
            timeout_s({"DISTLLM_TIMEOUT_S": text})
