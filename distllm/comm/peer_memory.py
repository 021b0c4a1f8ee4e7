"""Device memory of every rank of a host, mapped by all of them through CUDA IPC handles.

Knows addresses, not what is stored there. The handles travel over a communicator in host memory.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import torch
from cuda.bindings import runtime as cudart

from distllm.comm.base import TensorComm
from distllm.errors import CommError

HOST_LEN = 64  # bytes of a host name that are compared
HANDLE_LEN = 64  # CUDA_IPC_HANDLE_SIZE


@dataclass(frozen=True)
class PeerMemory:
    """One zeroed allocation per rank; addresses[r] is where this process sees that of rank r."""

    host: TensorComm
    addresses: tuple[int, ...]

    def close(self) -> None:
        """Unmap and free. Collective over host: nobody frees what a peer still has mapped."""
        torch.cuda.synchronize()
        for rank, address in enumerate(self.addresses):
            if rank != self.host.rank:
                _checked(cudart.cudaIpcCloseMemHandle(address))
        self.host.all_gather(torch.zeros(1, dtype=torch.uint8))
        _checked(cudart.cudaFree(self.addresses[self.host.rank]))


def try_map(host: TensorComm, num_bytes: int) -> PeerMemory | None:
    """Allocate num_bytes on this rank's current device and map those of all ranks.

    Collective over host, a communicator in host memory. None, on every rank, where a pair of them is on two
    hosts or cannot reach each other's memory.
    """
    own = _checked(cudart.cudaMalloc(num_bytes))
    _checked(cudart.cudaMemset(own, 0, num_bytes))
    _checked(cudart.cudaDeviceSynchronize())  # zeros are there before any peer can look
    addresses = [
        _try_open(row, own, rank == host.rank) for rank, row in enumerate(_gather_handles(host, own))
    ]
    memory = PeerMemory(host, tuple(address or 0 for address in addresses))
    if _all(host, None not in addresses):
        return memory
    for rank, address in enumerate(addresses):
        if address and rank != host.rank:
            _checked(cudart.cudaIpcCloseMemHandle(address))
    _all(host, True)  # nobody frees what a peer still has mapped
    _checked(cudart.cudaFree(own))
    return None


def _gather_handles(host: TensorComm, own: int) -> list[bytes]:
    """Host name and IPC handle of every rank."""
    handle = bytes(_checked(cudart.cudaIpcGetMemHandle(own)).reserved)
    name = socket.gethostname().encode()[:HOST_LEN].ljust(HOST_LEN, b"\0")
    mine = torch.frombuffer(bytearray(name + handle), dtype=torch.uint8)
    return [row.numpy().tobytes() for row in host.all_gather(mine)]


def _try_open(row: bytes, own: int, is_own: bool) -> int | None:
    """The address of a rank's memory in this process, None where it cannot be reached."""
    if is_own:
        return own
    if row[:HOST_LEN].rstrip(b"\0") != socket.gethostname().encode()[:HOST_LEN]:
        return None
    handle = cudart.cudaIpcMemHandle_t()
    handle.reserved = row[HOST_LEN : HOST_LEN + HANDLE_LEN]
    error, address = cudart.cudaIpcOpenMemHandle(handle, cudart.cudaIpcMemLazyEnablePeerAccess)
    if error != cudart.cudaError_t.cudaSuccess:
        cudart.cudaGetLastError()  # else the next check of the runtime would report it
        return None
    return int(address)


def _all(host: TensorComm, mine: bool) -> bool:
    return bool(host.all_gather(torch.tensor([mine], dtype=torch.uint8)).all())


def _checked(result: tuple[Any, ...]) -> Any:
    """The value of a runtime call. Raises CommError."""
    error, *values = result
    if error != cudart.cudaError_t.cudaSuccess:
        raise CommError(f"CUDA: {cudart.cudaGetErrorString(error)[1].decode()}")
    return values[0] if values else None
