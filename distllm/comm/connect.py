"""Opens the communicators of a job: the one place that chooses a transport. Knows the layout, not a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distllm import env
from distllm.comm import fatal
from distllm.comm.base import Channels, Control, TensorComm
from distllm.comm.local import LocalControl
from distllm.errors import LaunchError

if TYPE_CHECKING:
    import torch

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


def open_channels(control: Control, layout: RankLayout, device: torch.device | None = None) -> Channels:
    """Make the communicators of one engine, in the same order on every rank. Collective over control.

    device: this rank's, from select_device; tensors on a GPU travel by NCCL, all others by control's
    transport.
    """
    stage = layout.rank // layout.tp_size  # unique over dp × pp
    column = layout.dp_rank * layout.tp_size + layout.tp_rank
    on_gpu = device is not None and device.type == "cuda"
    groups = (
        ("tp", stage, layout.tp_rank),
        ("pipe", column, layout.pp_rank),
        ("tokens", column, layout.pp_rank),
    )
    opened = [control.split(color, key, name) for name, color, key in groups]
    if on_gpu:
        opened = [_to_gpu(comm, name) for comm, (name, _, _) in zip(opened, groups, strict=True)]
    return Channels(control, *opened)


def _to_gpu(host: TensorComm, name: str) -> TensorComm:
    """The ranks of host, between their GPUs. Collective over host; the result closes it."""
    if host.size == 1:  # nothing ever travels
        host.close()
        return LocalControl().split(0, 0, name)
    from distllm.comm.nccl import NcclComm

    comm = NcclComm(host, name, env.timeout_s(), peer_memory=name == "tp")
    if name != "tp":
        comm.connect_pairs()
    return comm
