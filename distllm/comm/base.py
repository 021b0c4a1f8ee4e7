"""What every communicator can do, on one screen. Knows ranks; never layers or requests.

Two conversations differ in kind. *Control* moves small host messages between all ranks of a job and may
wait without limit for work, sleeping. *Tensor* communicators move device tensors inside one step, and every
wait in them has a deadline. `local` and `mpi` implement both; `nccl` implements TensorComm alone.

All ranks of a communicator must call the same methods in the same order with the same shapes and dtypes: the
sequence of calls is a function of the step plan and of nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch


class TensorComm(Protocol):
    """Collectives and point-to-point messages on contiguous tensors of this rank's device."""

    rank: int  # of this communicator
    size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum x over all ranks, in place, and return it. In rank order: the same bits on every rank."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return [size, *x.shape]: x of every rank, in rank order."""
        ...

    def send(self, x: torch.Tensor, dst: int) -> None:
        """Send x to rank dst. Returns before completion: x must not be written afterwards."""
        ...

    def recv(self, x: torch.Tensor, src: int) -> torch.Tensor:
        """Fill x with the next message from rank src and return it. Messages of one pair arrive in order."""
        ...

    def close(self) -> None:
        """Wait for pending sends, then free. Collective. Calling it twice is harmless."""
        ...


class Control(Protocol):
    """Small host messages between all ranks of the job; owned by the thread that made it."""

    rank: int
    size: int
    local_rank: int  # among the ranks of this host
    local_size: int
    host: str

    def bcast(self, data: np.ndarray | None, *, idle: bool = False) -> np.ndarray:
        """Send the root's (rank 0's) 1-D int32 array to every rank; others pass None.

        idle=True waits without limit and sleeps between looks (≤ 3 % of a core); otherwise the deadline
        holds.
        """
        ...

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Return every rank's bytes (lengths may differ), in rank order."""
        ...

    def barrier(self) -> None:
        """Return when every rank has come."""
        ...

    def split(self, color: int, key: int, name: str = "split") -> TensorComm:
        """Make a communicator of the ranks with the same color, ordered by key. Collective over Control.

        name: how errors call it.
        """
        ...

    def last_words(self, text: str, grace_s: float) -> list[str] | None:
        """Return the texts of all ranks, in rank order, when all of them are leaving with one; else None.

        Called once, by a rank that will never again enter another collective of this job.
        """
        ...

    def abort(self, code: int) -> NoReturn:
        """End the whole job with this exit code, now. Any rank may call it, alone."""
        ...

    def close(self) -> None:
        """Free what this object made (never what the caller passed in). Collective."""
        ...


@dataclass(frozen=True)
class Channels:
    """The communicators of one engine: one per conversation, made once by `connect`, closed in reverse."""

    control: Control
    tp: TensorComm  # the tensor-parallel ranks of one stage
    pipe: TensorComm  # activations: the stages of one tp rank, ordered by pp_rank
    tokens: TensorComm  # sampled ids, last stage → first: the same ranks as `pipe`, its own order of messages

    def close(self) -> None:
        """Close the tensor communicators. Collective. The control communicator belongs to whoever made it."""
        for channel in (self.tokens, self.pipe, self.tp):
            channel.close()
