"""Tensor communicators between GPUs: NCCL through nccl4py, and peer-memory kernels where those are quicker.

The only importer of nccl4py. Everything runs on the current CUDA stream and may be captured in a graph, but
for send, which has a stream of its own. Host waits (start, connect, close) have deadlines: the NCCL
communicators are non-blocking and polled. Knows ranks and tensors; never layers.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from distllm.comm.base import TensorComm
from distllm.comm.waiting import wait_until
from distllm.errors import CommError, CommTimeout, LaunchError

try:
    import nccl.core as nccl
    from nccl.bindings.nccl import NCCLError
except ImportError as missing:
    raise LaunchError(f"no NCCL binding: {missing}; install distllm[cuda13] or distllm[cuda12]") from missing

if TYPE_CHECKING:
    from distllm.comm.one_shot import OneShot

ABORT_LIMIT_S = 5.0  # ncclCommAbort may hang when a peer is in trouble


class NcclComm:
    """TensorComm on one GPU per rank. Point-to-point messages need care: see send.

    all_reduce gives the same bits on every rank; in rank order where the peer-memory kernels run, in NCCL's
    order elsewhere.
    """

    def __init__(self, host: TensorComm, name: str, timeout_s: float, *, peer_memory: bool) -> None:
        """Collective over host, a communicator in host memory of the same ranks, which close() closes.

        The current CUDA device must be this rank's own. peer_memory: reduce small messages by the kernels of
        one_shot, if the ranks reach each other's memory. Raises CommTimeout when a rank does not come,
        CommError when NCCL cannot connect them.
        """
        self.rank, self.size = host.rank, host.size
        self._host, self._name, self._timeout_s = host, name, timeout_s
        _check_library()
        self._send_stream = torch.cuda.Stream()
        self._in_group = False
        self._comm: Any = nccl.Communicator()
        unique_id = _share_unique_id(host)
        config = nccl.NCCLConfig(blocking=False)
        self._call("init", lambda: self._comm.initialize(self.size, self.rank, unique_id, config))
        self.one_shot = self._try_one_shot() if peer_memory else None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self.one_shot is not None and self.one_shot.takes(x):
            return self.one_shot.all_reduce(x)
        if x.numel():
            self._call("all_reduce", lambda: self._comm.allreduce(x, x, nccl.SUM, stream=_stream()))
        return x

    def try_all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """OneShot.all_reduce_add_norm, or None where only NCCL can carry x: the same answer on every rank."""
        if self.one_shot is None or not self.one_shot.takes_rows(x):
            return None
        return self.one_shot.all_reduce_add_norm(x, residual, weight, eps)

    def connect_pairs(self) -> None:
        """Open the way between every two ranks, which send and recv need. Collective; once, at the start.

        Left to the first message, NCCL would make its sender wait for the receiver, on the host.
        """
        mine = torch.zeros(1, device="cuda")
        with self.grouped():
            for peer in range(self.size):
                self.send(mine, peer)
                self.recv(torch.empty_like(mine), peer)
        self._wait_for_device("connect_pairs")

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        gathered = x.new_empty((self.size, *x.shape))
        if x.numel():
            self._call("all_gather", lambda: self._comm.allgather(x, gathered, stream=_stream()))
        return gathered

    def broadcast(self, x: torch.Tensor, root: int) -> torch.Tensor:
        """Fill x with rank root's and return it."""
        if x.numel():
            self._call("broadcast", lambda: self._comm.broadcast(x, x, root, stream=_stream()))
        return x

    def send(self, x: torch.Tensor, dst: int) -> None:
        """Send x to rank dst, on a stream of its own behind the current one. Not inside a graph capture.

        The current stream goes on at once, but the next operation of *this communicator* starts only when dst
        has taken the message: ranks may send first and receive afterwards on two communicators, or inside
        grouped().
        """
        if self._in_group:
            self._call(f"send to rank {dst}", lambda: self._comm.send(x, dst, stream=_stream()))
            return
        self._send_stream.wait_stream(_stream())
        x.record_stream(self._send_stream)  # its memory is not given away before it is sent
        self._call(f"send to rank {dst}", lambda: self._comm.send(x, dst, stream=self._send_stream))

    def recv(self, x: torch.Tensor, src: int) -> torch.Tensor:
        self._call(f"recv from rank {src}", lambda: self._comm.recv(x, src, stream=_stream()))
        return x

    @contextmanager
    def grouped(self) -> Iterator[None]:
        """Start all NCCL operations of the block together, on the current stream: their order is free."""
        self._in_group = True
        try:
            nccl.group_start()
            yield
        finally:
            self._in_group = False
            self._call("group", nccl.group_end)

    def check(self) -> None:
        """Raise CommError if NCCL met an error since: graph replays report none. Not collective."""
        self._call("check", lambda: None)

    def close(self) -> None:
        """As TensorComm.close. Graphs that captured this communicator must be gone: NCCL waits for that."""
        if self._comm is None:
            return
        self._wait_for_device("close")
        if self.one_shot is not None:
            self.one_shot.close()
        self._call("close", self._comm.finalize)
        self._comm.destroy()
        self._comm = None
        self._host.close()

    def abort(self) -> None:
        """Give up what is under way and forget the communicator. Not collective; takes seconds at most."""
        comm, self._comm = self._comm, None
        if comm is not None:
            thread = threading.Thread(target=comm.abort, daemon=True)
            thread.start()
            thread.join(ABORT_LIMIT_S)

    def _try_one_shot(self) -> OneShot | None:
        from distllm.comm.one_shot import try_one_shot

        return try_one_shot(self._host, self._timeout_s)

    def _call(self, call: str, begin: Callable[[], object]) -> None:
        """Make one NCCL call, then wait until NCCL has taken it: enqueued, not executed.

        No kernel may be launched on the stream earlier. Raises CommError, CommTimeout, after which the
        communicator is gone.
        """
        if self._comm is None:
            raise CommError(f"{call} on the closed communicator {self._name}")
        try:
            begin()
            if not self._in_group:
                wait_until(lambda: self._is_ready(call), self._describe(call), self._timeout_s)
        except NCCLError as error:
            self.abort()
            raise CommError(f"{self._describe(call)}: {error}") from error
        except CommError:
            self.abort()
            raise

    def _is_ready(self, call: str) -> bool:
        state = self._comm.get_async_error()
        if state not in (_SUCCESS, _IN_PROGRESS):
            text = nccl.get_error_string(state)
            raise CommError(f"{self._describe(call)}: {text} ({self._comm.get_last_error()})")
        return bool(state == _SUCCESS)

    def _wait_for_device(self, call: str) -> None:
        """All that was launched on either stream is done. Raises CommTimeout."""
        done = torch.cuda.Event()
        _stream().wait_stream(self._send_stream)
        done.record()
        try:
            wait_until(done.query, self._describe(call), self._timeout_s)
        except CommTimeout:
            self.abort()
            raise

    def _describe(self, call: str) -> str:
        return f"{call} on {self._name} (rank {self.rank} of {self.size}, {socket.gethostname()})"


_SUCCESS, _IN_PROGRESS = 0, 7  # ncclResult_t


def _check_library() -> None:
    """Raise LaunchError unless nccl4py uses the NCCL library that torch has loaded."""
    found, wanted = nccl.get_version().libnccl, ".".join(map(str, torch.cuda.nccl.version()))
    if found is None or str(found.version) != wanted:
        raise LaunchError(
            f"two NCCL libraries: torch uses {wanted}, nccl4py found {found}; uninstall one of them"
        )


def _share_unique_id(host: TensorComm) -> Any:
    """Rank 0's fresh unique id, on every rank."""
    mine = nccl.get_unique_id(empty=host.rank != 0)
    gathered = host.all_gather(torch.frombuffer(bytearray(mine.as_bytes), dtype=torch.uint8))
    return nccl.UniqueId.from_bytes(gathered[0].numpy().tobytes())


def _stream() -> torch.cuda.Stream:
    return torch.cuda.current_stream()
