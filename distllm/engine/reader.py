"""Bytes from files to a device at the speed of the disk. Knows files and buffers; never tensors or shards.

Threads read ahead into a ring of buffers, pinned if the device is a GPU. There the copy of one buffer runs
while the next are read. Reads are in order, so all ranks of a host meet the same pages in its cache. Not by
mmap: page faults read in small steps, and a file that shrinks would end the process with SIGBUS.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from distllm.engine.checksum import crc32
from distllm.engine.dtypes import tensor_bytes
from distllm.errors import CheckpointError

CHUNK_BYTES = 8 * 2**20  # of one read, and of a buffer
NUM_THREADS = 8  # reads in flight: what an NVMe disk or a parallel file system needs


@dataclass(frozen=True)
class Span:
    """Bytes of a file. checked: their CRC-32 is wanted, too."""

    file: Path
    offset: int
    num_bytes: int
    checked: bool = False


def read_ahead(spans: Sequence[Span], device: torch.device) -> Iterator[tuple[torch.Tensor, int | None]]:
    """The bytes of each span in turn, on the device, and their CRC-32 where it is wanted.

    The bytes are valid until the next are asked for, on a GPU for work on the current stream. Raises
    CheckpointError if a file cannot be read or ends too soon.
    """
    size = max((span.num_bytes for span in spans), default=0)
    # Two more than are being read: one is at the caller, one on its way to the device.
    ring = [_Buffer(size, device) for _ in range(min(NUM_THREADS + 2, len(spans)))]
    reading: deque[tuple[_Buffer, Future[int | None]]] = deque()
    with ExitStack() as stack:
        files: dict[Path, int] = {}
        pool = stack.enter_context(ThreadPoolExecutor(NUM_THREADS))
        for number, span in enumerate(spans):
            if len(reading) == NUM_THREADS:
                yield _delivered(*reading.popleft())
            if span.file not in files:
                files[span.file] = _open(span.file, stack)
            buffer = ring[number % len(ring)]
            buffer.wait_copied()
            reading.append((buffer, pool.submit(buffer.read, files[span.file], span)))
        while reading:
            yield _delivered(*reading.popleft())


def _delivered(buffer: _Buffer, done: Future[int | None]) -> tuple[torch.Tensor, int | None]:
    crc = done.result()
    return buffer.on_device(), crc


def _open(file: Path, stack: ExitStack) -> int:
    """A descriptor that is open until the stack is left."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    stack.callback(os.close, descriptor)
    return descriptor


class _Buffer:
    """Host memory that a thread fills and the device copies from, in turn."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._content = self._memory
        self._device = device
        self._copied = torch.cuda.Event() if on_gpu else None

    def read(self, descriptor: int, span: Span) -> int | None:
        """Fill it, in any thread. Returns the CRC-32 if it is wanted."""
        self._content = self._memory[: span.num_bytes]
        try:
            _read_fully(descriptor, tensor_bytes(self._content), span)
        except OSError as error:
            raise CheckpointError(f"cannot read {span.file}: {error.strerror}") from error
        return crc32(self._content) if span.checked else None

    def on_device(self) -> torch.Tensor:
        """The content; on a GPU a copy that is under way on the current stream."""
        content = self._content.to(self._device, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))
        return content

    def wait_copied(self) -> None:
        """Until it may be filled again."""
        if self._copied is not None:
            self._copied.synchronize()


def _read_fully(descriptor: int, memory: memoryview, span: Span) -> None:
    if hasattr(os, "posix_fadvise"):  # all pages at once; the kernel's own read-ahead takes smaller steps
        os.posix_fadvise(descriptor, span.offset, span.num_bytes, os.POSIX_FADV_WILLNEED)
    done = 0
    while done < span.num_bytes:
        count = os.preadv(descriptor, [memory[done:]], span.offset + done)
        if count == 0:
            raise CheckpointError(
                f"{span.file} is damaged or incomplete: it ends at byte {span.offset + done}, before "
                f"{span.offset + span.num_bytes}"
            )
        done += count
