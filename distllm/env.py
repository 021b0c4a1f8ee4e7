"""The only reader of os.environ: who the launcher says we are, and the few DISTLLM_* settings. A leaf."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from distllm.errors import ConfigError

DEFAULT_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class LauncherIdentity:
    """One process as its launcher numbers it. None where the launcher does not say."""

    launcher: str
    rank: int
    size: int | None
    local_rank: int | None


# launcher, then its variables for rank, size and local rank. The first whose rank is set wins: under mpirun
# inside a Slurm allocation SLURM_PROCID belongs to the daemon that started us, so Slurm is asked after the
# MPI launchers. Its STEP variable is needed because a batch shell has SLURM_PROCID too, without being a task.
_DIALECTS = (
    ("Open MPI mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpiexec (PMI)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("a PMIx launcher", "PMIX_RANK", "", ""),
)


def launcher_identity(environ: Mapping[str, str] = os.environ) -> LauncherIdentity | None:
    """Return what the launcher says, or None when this process was started by hand."""
    for launcher, rank_name, size_name, local_name in _DIALECTS:
        rank, size = _integer(environ, rank_name), _integer(environ, size_name)
        if rank is not None and (size is not None or not size_name):
            return LauncherIdentity(launcher, rank, size, _integer(environ, local_name))
    return None


def launcher_advice(identity: LauncherIdentity) -> str:
    """What to change when MPI does not see the world that this launcher started."""
    if identity.launcher == "srun":
        return "use srun --mpi=pmix for Open MPI, srun --mpi=pmi2 for MPICH (srun --mpi=list shows both)"
    return "use the mpirun that was installed with this MPI library (launch/mpirun.sh finds it beside python)"


def timeout_s(environ: Mapping[str, str] = os.environ) -> float:
    """DISTLLM_TIMEOUT_S: how long a rank waits for the others in a collective before the job is given up."""
    text = environ.get("DISTLLM_TIMEOUT_S", str(DEFAULT_TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ConfigError(f"DISTLLM_TIMEOUT_S is {text!r}; it must be a positive number of seconds")
    return seconds


def gpus_disabled(environ: Mapping[str, str] = os.environ) -> bool:
    """DISTLLM_DEVICE=cpu: compute on the CPU although there are GPUs. Unset or empty: on the GPUs, if any."""
    device = environ.get("DISTLLM_DEVICE", "")
    if device not in ("", "cpu"):
        raise ConfigError(f"DISTLLM_DEVICE is {device!r}; leave it unset to use the GPUs, or set it to cpu")
    return device == "cpu"


def _integer(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else None
