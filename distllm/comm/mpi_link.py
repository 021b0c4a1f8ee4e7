"""One MPI communicator, and how distllm calls it: start, wait with a deadline, explain what failed.

Is handed mpi4py's objects and imports none. Buffer methods only. Knows bytes; no tensor, no plan.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from distllm.comm.waiting import wait_until
from distllm.errors import CommError


class Link:
    """One MPI communicator, and our way to call it: start, wait with a deadline, explain."""

    def __init__(self, comm: Any, name: str, timeout_s: float) -> None:
        self.comm = comm
        self.name = name
        self.timeout_s = timeout_s
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    def run(self, call: str, begin: Callable[[], Any], *, idle: bool = False) -> None:
        """Start a non-blocking MPI call and wait for its request. Raises CommError, CommTimeout."""
        request = self.start(call, begin)
        self.wait(call, request.Test, idle=idle)

    def start(self, call: str, begin: Callable[[], Any]) -> Any:
        if self.comm is None:
            raise CommError(f"{call} on the closed communicator {self.name}")
        with self._explained(call):
            return begin()

    def wait(self, call: str, test: Callable[[], bool], *, idle: bool = False) -> None:
        with self._explained(call):
            wait_until(test, self.describe(call), None if idle else self.timeout_s)

    @contextmanager
    def _explained(self, call: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # which mpi4py.MPI.Exception is
            raise CommError(f"{self.describe(call)}: {error}") from error

    def describe(self, call: str) -> str:
        return f"{call} on {self.name} (rank {self.rank} of {self.size}, {socket.gethostname()})"

    def barrier(self, call: str = "barrier", *, idle: bool = False) -> None:
        self.run(call, lambda: self.comm.Ibarrier(), idle=idle)

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        lengths = np.empty(self.size, dtype=np.int64)
        mine = np.array([len(data)], dtype=np.int64)
        self.run("all_gather_bytes", lambda: self.comm.Iallgather(mine, lengths))
        joined = np.empty(int(lengths.sum()), dtype=np.uint8)
        source = np.frombuffer(data, dtype=np.uint8)
        self.run("all_gather_bytes", lambda: self.comm.Iallgatherv(source, [joined, lengths]))
        return [part.tobytes() for part in np.split(joined, np.cumsum(lengths)[:-1])]

    def free(self) -> None:
        """Collective; a second call does nothing."""
        if self.comm is not None:
            self.barrier("close")
            self.comm.Free()
            self.comm = None


class Outbox:
    """Sends under way on one communicator. A buffer lives until its send is complete; nobody waits."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._pending: deque[tuple[Any, np.ndarray]] = deque()

    def send(self, buffer: np.ndarray, dst: int) -> None:
        self.reap()
        request = self._link.start(f"send to rank {dst}", lambda: self._link.comm.Isend(buffer, dst))
        self._pending.append((request, buffer))

    def reap(self) -> bool:
        """Let go of the buffers whose sends are complete, oldest first. True when none is left."""
        while self._pending and self._pending[0][0].Test():
            self._pending.popleft()
        return not self._pending

    def flush(self) -> None:
        self._link.wait("pending sends", self.reap)
