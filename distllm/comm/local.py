"""Communicators inside one process: one rank alone, or N ranks as threads for tests.

Ranks meet in a `_Group`. Every call carries its name and shape, so that ranks whose calls do not match fail
with both names instead of hanging. One rank is a group of one, where nothing ever waits. Knows no MPI.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from distllm.comm.reduction import sum_in_rank_order
from distllm.errors import CommError, CommTimeout

if TYPE_CHECKING:
    import numpy as np
    import torch

Result = TypeVar("Result")


class _World:
    """All ranks of one job: the lock they share and the first failure, which is everybody's."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.changed = threading.Condition()
        self.failure: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    def wait(self, ready: Callable[[], bool], what: str, timeout_s: float | None) -> None:
        """Wait until ready(). The caller holds the lock. Raises CommError as soon as any rank failed."""
        if not self.changed.wait_for(lambda: ready() or self.failure is not None, timeout_s):
            raise CommTimeout(f"{what}: the other ranks did not come within {timeout_s} s")
        if not ready():
            raise CommError(f"{what}: another rank failed: {self.failure!r}")


class _Group:
    """The ranks of one communicator: a meeting for each collective, and a mailbox for each (src, dst)."""

    def __init__(self, world: _World, size: int) -> None:
        self.world = world
        self.size = size
        self._rounds: dict[int, dict[int, tuple[str, Any]]] = defaultdict(dict)
        self._next_round = [0] * size
        self._mail: dict[tuple[int, int], deque[torch.Tensor]] = defaultdict(deque)

    def exchange(self, rank: int, call: str, value: Any, *, idle: bool = False) -> list[Any]:
        """Return the value of every rank. Raises CommError when the ranks' calls differ."""
        with self.world.changed:
            number = self._next_round[rank]
            self._next_round[rank] += 1
            posts = self._rounds[number]
            posts[rank] = (call, value)
            self.world.changed.notify_all()
            self.world.wait(lambda: len(posts) == self.size, call, None if idle else self.world.timeout_s)
            self._rounds.pop(number, None)
        calls = [posts[peer][0] for peer in range(self.size)]
        if len(set(calls)) > 1:
            raise CommError(f"the ranks call different collectives: {calls}")
        return [posts[peer][1] for peer in range(self.size)]

    def post(self, src: int, dst: int, x: torch.Tensor) -> None:
        with self.world.changed:
            self._mail[src, dst].append(x)
            self.world.changed.notify_all()

    def take(self, src: int, dst: int) -> torch.Tensor:
        with self.world.changed:
            box = self._mail[src, dst]
            self.world.wait(lambda: bool(box), f"recv from rank {src}", self.world.timeout_s)
            return box.popleft()


class LocalComm:
    """TensorComm of one thread. Messages are copied: sender and receiver share their memory."""

    def __init__(self, group: _Group, rank: int) -> None:
        self._group = group
        self.rank = rank
        self.size = group.size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self.size == 1:
            return x
        return sum_in_rank_order(self._gather("all_reduce", x), out=x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.stack(self._gather("all_gather", x))

    def send(self, x: torch.Tensor, dst: int) -> None:
        self._group.post(self.rank, dst, x.clone())

    def recv(self, x: torch.Tensor, src: int) -> torch.Tensor:
        message = self._group.take(src, self.rank)
        if (message.shape, message.dtype) != (x.shape, x.dtype):
            raise CommError(f"recv of {_describe(x)} met a message of {_describe(message)} from rank {src}")
        return x.copy_(message)

    def close(self) -> None:
        """Nothing is pending: post() has already copied."""

    def _gather(self, call: str, x: torch.Tensor) -> list[torch.Tensor]:
        return self._group.exchange(self.rank, f"{call} of {_describe(x)}", x.clone())


class LocalControl:
    """Control of one thread; without arguments, of a rank that is alone."""

    def __init__(self, group: _Group | None = None, rank: int = 0) -> None:
        self._group = group or _Group(_World(timeout_s=0), size=1)
        self.rank = self.local_rank = rank
        self.size = self.local_size = self._group.size
        self.host = socket.gethostname()

    def bcast(self, data: np.ndarray | None, *, idle: bool = False) -> np.ndarray:
        copy = None if data is None else data.copy()
        result: np.ndarray = self._group.exchange(self.rank, "bcast", copy, idle=idle)[0]
        return result

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        return self._group.exchange(self.rank, "all_gather_bytes", data)

    def barrier(self) -> None:
        self._group.exchange(self.rank, "barrier", None)

    def split(self, color: int, key: int, name: str = "split") -> LocalComm:
        places = self._group.exchange(self.rank, f"split {name}", (color, key, self.rank))
        members = [rank for other, _, rank in sorted(places) if other == color]
        made = _Group(self._group.world, len(members)) if members[0] == self.rank else None
        groups = self._group.exchange(self.rank, f"split {name}", made)
        return LocalComm(groups[members[0]], members.index(self.rank))

    def last_words(self, text: str, grace_s: float) -> list[str] | None:
        return [text] if self.size == 1 else None

    def abort(self, code: int) -> NoReturn:
        self._group.world.fail(CommError(f"rank {self.rank} aborted the job with code {code}"))
        raise SystemExit(code)

    def close(self) -> None:
        """Nothing to free."""


def run_ranks(n: int, fn: Callable[[LocalControl], Result], timeout_s: float = 60) -> list[Result]:
    """Call fn(control) in n threads, as n ranks of one job, and return the results in rank order.

    The first error of any rank is raised here; the waits of the others end at once with CommError.
    """
    world = _World(timeout_s)
    group = _Group(world, n)
    results: dict[int, Result] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = fn(LocalControl(group, rank))
        except BaseException as error:
            world.fail(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(n)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s + 1  # later than any wait's, which says more
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        world.fail(CommTimeout(f"{n} ranks did not finish within {timeout_s} s"))
    if world.failure is not None:
        raise world.failure
    return [results[rank] for rank in range(n)]


def _describe(x: torch.Tensor) -> str:
    return f"{list(x.shape)} {x.dtype}"
