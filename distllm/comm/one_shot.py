"""All-reduce of small messages by kernels over peer memory (one_shot.cu), compiled when first called.

Owns the mapped memory, the kernels and the table of which message goes which way; NcclComm asks `takes` and
falls back to NCCL. Idea of the pushed mode: NCCL's LL protocol; of the fused norm: kraken, TensorRT-LLM.
Knows no layers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cuda.core import Device, LaunchConfig, Program, ProgramOptions, launch

from distllm.comm.base import TensorComm
from distllm.comm.peer_memory import PeerMemory, try_map

MAX_BLOCKS = 2048  # of a launch. Those that do not fit at once start in order on every rank: none starves
MAX_THREADS = 1024
CAPACITY = 16 << 20  # bytes of the largest message; longer ones go in pieces
PUSH_CAPACITY = 512 << 10  # of the largest pushed one
CHUNK_BYTES = 4 << 10  # of one block's share of a message that has no rows, unless there are too few blocks
VEC_BYTES = 16
DTYPES = {torch.bfloat16: "BFloat16", torch.float16: "Float16"}
ITEMS = (1, 2)  # vectors of one thread: rows of up to 16384 values; more would not fit the registers


class Mode(Enum):
    """How the sums of a row reach every rank; the names are one_shot.cu's."""

    PUSH = "PUSH"
    PULL = "PULL"
    TWO_SHOT = "TWO_SHOT"


@dataclass(frozen=True)
class Limits:
    """Bytes up to which each mode is the quickest; above the last, NCCL is."""

    push: int
    pull: int
    two_shot: int


# By the number of ranks. 2: measured on H100s with NVLink (tests/gpu/time_all_reduce.py); no step sends more.
# 4 and 8: not yet; they follow from it by the bytes that a rank sends, n - 1 times its message when it pushes
# or pulls.
LIMITS = {
    2: Limits(push=512 << 10, pull=1 << 30, two_shot=0),
    4: Limits(push=128 << 10, pull=512 << 10, two_shot=4 << 20),
    8: Limits(push=64 << 10, pull=128 << 10, two_shot=4 << 20),
}


class OneShot:
    """The kernels of one communicator. All ranks make the same calls in the same order, each on one stream.

    Sums are taken in fp32 in rank order: the same bits on every rank. The first call of a kind compiles, so
    it may not be inside a graph capture; the later ones may.
    """

    def __init__(self, memory: PeerMemory, rank: int, size: int, timeout_s: float) -> None:
        self._memory = memory
        self._limits = LIMITS[min(known for known in LIMITS if known >= size)]
        self._source = _macros(memory.addresses, rank, timeout_s) + _SOURCE.read_text()
        self._kernel = functools.cache(self._compile)

    def takes(self, x: torch.Tensor) -> bool:
        """Is all_reduce(x) for us? The same answer on every rank: it follows from shape and dtype."""
        return x.dtype in DTYPES and 0 < x.nbytes <= self._max_bytes and _whole_vectors(x)

    def takes_rows(self, x: torch.Tensor) -> bool:
        """Is all_reduce_add_norm of x, [num_tokens, hidden_size], for us?"""
        row_bytes = x.shape[-1] * x.itemsize
        whole = x.ndim == 2 and row_bytes % VEC_BYTES == 0
        return whole and row_bytes <= MAX_THREADS * ITEMS[-1] * VEC_BYTES and self.takes(x)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum x over the ranks, in place, on the current stream. Collective; takes(x) must hold."""
        for piece in x.view(-1).split(CAPACITY // x.itemsize):
            num_vecs = piece.nbytes // VEC_BYTES
            row_vecs = max(CHUNK_BYTES // VEC_BYTES, -(-num_vecs // MAX_BLOCKS))
            scalars = np.int32(row_vecs), np.int32(num_vecs)
            self._launch("all_reduce", piece, -(-num_vecs // row_vecs), row_vecs, piece, piece, *scalars)
        return x

    def all_reduce_add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(total) · weight, total) with total = Σ x over the ranks + residual: a kernel a piece.

        x, residual: [num_tokens, hidden_size]; weight: [hidden_size]; all contiguous and of one dtype; x and
        residual are left as they are. Collective, on the current stream; takes_rows(x) must hold.
        """
        assert x.dtype == residual.dtype == weight.dtype and x.shape == residual.shape, "one dtype, one shape"
        assert _whole_vectors(residual) and _whole_vectors(weight), "loads are 16 bytes wide"
        normed, total = torch.empty_like(x), torch.empty_like(x)
        row_vecs = x.shape[1] * x.itemsize // VEC_BYTES
        scalars = np.int32(row_vecs), np.float32(eps)
        rows = min(MAX_BLOCKS, CAPACITY // (row_vecs * VEC_BYTES))
        for parts in zip(*(tensor.split(rows) for tensor in (x, residual, normed, total)), strict=True):
            part, old, *new = parts
            args = (part, old, weight, *new, *scalars)
            self._launch("all_reduce_add_norm", part, len(part), row_vecs, *args)
        return normed, total

    def close(self) -> None:
        """Free the mapped memory. Collective."""
        self._memory.close()

    @property
    def _max_bytes(self) -> int:
        return max(self._limits.push, self._limits.pull, self._limits.two_shot)

    def _mode(self, nbytes: int) -> Mode:
        if nbytes <= self._limits.push:
            return Mode.PUSH
        return Mode.PULL if nbytes <= self._limits.pull else Mode.TWO_SHOT

    def _launch(self, name: str, x: torch.Tensor, num_blocks: int, row_vecs: int, *args: Any) -> None:
        items = next(n for n in ITEMS if row_vecs <= n * MAX_THREADS)
        threads = -(-row_vecs // items // 32) * 32
        kernel = self._kernel(f"{name}<{DTYPES[x.dtype]}, {items}, {self._mode(x.nbytes).value}>")
        pointers = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
        launch(torch.cuda.current_stream(), LaunchConfig(grid=num_blocks, block=threads), kernel, *pointers)

    def _compile(self, name: str) -> Any:
        assert not torch.cuda.is_current_stream_capturing(), f"call {name} once before it is captured"
        device = Device(torch.cuda.current_device())
        device.set_current()
        program = Program(self._source, "c++", ProgramOptions(arch=f"sm_{device.arch}", std="c++17"))
        return program.compile("cubin", name_expressions=[name]).get_kernel(name)


def try_one_shot(host: TensorComm, timeout_s: float) -> OneShot | None:
    """Set up the kernels among the ranks of host, a communicator in host memory. Collective.

    None, on every rank, where they are too many or cannot reach each other's memory.
    """
    if not 1 < host.size <= max(LIMITS):
        return None
    memory = try_map(host, _places(host.size)["END"])
    return None if memory is None else OneShot(memory, host.rank, host.size, timeout_s)


_SOURCE = Path(__file__).with_name("one_shot.cu")


def _places(size: int) -> dict[str, int]:
    """Where things are in a rank's memory: byte offsets, by the names that one_shot.cu uses."""
    lengths = {
        "FLAGS_AT": 2 * MAX_BLOCKS * size * 8,  # two phases, one flag per block and peer
        "EPOCHS_AT": MAX_BLOCKS * 8,
        "INPUTS_AT": 2 * CAPACITY,  # twice each: double buffers
        "SUMS_AT": 2 * CAPACITY,
        "INBOX_AT": 2 * size * 2 * PUSH_CAPACITY,  # pushed messages are twice their length
        "END": 0,
    }
    starts = np.cumsum([0, *lengths.values()])[:-1]
    return {name: int(start) for name, start in zip(lengths, starts, strict=True)}


def _macros(addresses: tuple[int, ...], rank: int, timeout_s: float) -> str:
    """The #define lines that bind one_shot.cu to these ranks."""
    values: dict[str, object] = {
        "RANK": rank,
        "SIZE": len(addresses),
        "MEMORY": ", ".join(f"{address:#x}ull" for address in addresses),
        "MAX_BLOCKS": MAX_BLOCKS,
        "CAPACITY": CAPACITY,
        "PUSH_CAPACITY": PUSH_CAPACITY,
        "TIMEOUT_NS": f"{int(timeout_s * 1e9)}ull",
        **_places(len(addresses)),
    }
    return "".join(f"#define {name} {value}\n" for name, value in values.items())


def _whole_vectors(x: torch.Tensor) -> bool:
    return x.is_contiguous() and x.nbytes % VEC_BYTES == 0 and x.data_ptr() % VEC_BYTES == 0
