"""Which device a rank computes on: one GPU each, under every launcher's way to bind them, or the CPU for all.

Knows ranks, hosts and GPUs; nothing of what runs there.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from distllm import env
from distllm.errors import LaunchError

if TYPE_CHECKING:
    import torch

    from distllm.comm.base import Control


@dataclass(frozen=True)
class Seat:
    """Where one rank sits."""

    host: str
    gpu: str  # "cuda:1 NVIDIA H100 80GB HBM3 4f3c…": index in that process, name, UUID; "cpu"
    uuid: str  # empty without a GPU


def select_device(control: Control) -> torch.device:
    """This rank's device: "cuda:i", made current, or "cpu" where there is no GPU or DISTLLM_DEVICE=cpu.

    Collective over control. Raises LaunchError, the same on every rank and with the map of all ranks, when
    two of them would share a GPU or only some have one.
    """
    import torch

    device = _own_device(control.local_rank)
    seats = [Seat(**json.loads(text)) for text in control.all_gather_bytes(_seat_text(control.host, device))]
    check_seats(seats)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def check_seats(seats: list[Seat]) -> None:
    """Raise LaunchError unless each rank has a GPU of its own, or none has one. seats: in rank order."""
    without = [rank for rank, seat in enumerate(seats) if not seat.uuid]
    if 0 < len(without) < len(seats):
        raise LaunchError(f"ranks {without} see no GPU, the others do; {_ADVICE}\n{seat_map(seats)}")
    users = Counter((seat.host, seat.uuid) for seat in seats if seat.uuid)
    shared = [rank for rank, seat in enumerate(seats) if users[seat.host, seat.uuid] > 1]
    if shared:
        raise LaunchError(
            f"ranks {shared} share a GPU, and each rank needs its own; {_ADVICE}\n{seat_map(seats)}"
        )


def seat_map(seats: list[Seat]) -> str:
    """rank → host → GPU, a line each."""
    width = max(len(seat.host) for seat in seats)
    return "\n".join(f"  rank {rank:<3} {seat.host:<{width}}  {seat.gpu}" for rank, seat in enumerate(seats))


_ADVICE = "start fewer ranks per host, or correct CUDA_VISIBLE_DEVICES; DISTLLM_DEVICE=cpu uses no GPU"


def _own_device(local_rank: int) -> torch.device:
    """By node-local rank, whether this process sees all GPUs of the host or only the one bound to it."""
    import torch

    if env.gpus_disabled() or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def _seat_text(host: str, device: torch.device) -> bytes:
    return json.dumps(asdict(_seat(host, device))).encode()


def _seat(host: str, device: torch.device) -> Seat:
    import torch

    if device.type == "cpu":
        return Seat(host, "cpu", "")
    properties = torch.cuda.get_device_properties(device)
    uuid = str(properties.uuid)
    return Seat(host, f"{device} {properties.name} {uuid}", uuid)
