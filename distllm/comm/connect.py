"""Opens the communicators of a job: the one place that chooses a transport. Knows the layout, not a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distllm import env
from distllm.comm import fatal
from distllm.comm.base import Channels, Control
from distllm.comm.local import LocalControl
from distllm.errors import LaunchError

if TYPE_CHECKING:
    from distllm.parallel.layout import RankLayout


def open_control(comm: Any = None, world_size_wanted: int = 1, timeout_s: float | None = None) -> Control:
    """Return the control communicator of this job. Collective over all ranks that were started.

    comm: an mpi4py communicator to work in, or a rank of run_ranks; None means all ranks. With one rank MPI
    is not even imported. With several, uncaught exceptions end the whole job from now on (`fatal`). Whether
    the world has the wanted size is for the layout to check. Raises LaunchError.
    """
    if isinstance(comm, LocalControl):
        return comm
    identity = env.launcher_identity()
    if comm is None and identity is None and world_size_wanted > 1:
        raise LaunchError(
            f"{world_size_wanted} ranks are wanted, but this process was started alone; "
            f"start it as: mpirun -n {world_size_wanted} python …"
        )
    if comm is None and (identity is None or identity.size == 1):
        return LocalControl()
    from distllm.comm import mpi

    fatal.install()
    control = mpi.connect(comm, timeout_s or env.timeout_s())
    fatal.install(control)
    return control


def open_channels(control: Control, layout: RankLayout) -> Channels:
    """Make the communicators of one engine, in the same order on every rank. Collective over control."""
    stage = layout.rank // layout.tp_size  # unique over dp × pp
    column = layout.dp_rank * layout.tp_size + layout.tp_rank
    return Channels(
        control=control,
        tp=control.split(stage, layout.tp_rank, "tp"),
        pipe=control.split(column, layout.pp_rank, "pipe"),
        tokens=control.split(column, layout.pp_rank, "tokens"),
    )
