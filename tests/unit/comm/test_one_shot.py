"""The host side of the peer-memory kernels: which message goes which way, and where things lie in memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cuda.core", reason="comes with distllm[cuda13]")

from distllm.comm import one_shot
from distllm.comm.local import LocalControl
from distllm.comm.one_shot import CAPACITY, LIMITS, MAX_BLOCKS, PUSH_CAPACITY, VEC_BYTES, Mode, OneShot
from distllm.comm.peer_memory import PeerMemory


def kernels(size: int) -> OneShot:
    memory = PeerMemory(LocalControl().split(0, 0), tuple(range(4096, 4096 * (size + 1), 4096)))
    return OneShot(memory, 0, size, timeout_s=1)


@pytest.mark.parametrize("size", range(2, 9))
def test_the_places_do_not_overlap(size: int) -> None:
    places = one_shot._places(size)
    assert list(places.values()) == sorted(places.values())
    assert all(place % VEC_BYTES == 0 for place in places.values())
    assert places["EPOCHS_AT"] == 2 * MAX_BLOCKS * size * 8
    assert places["END"] - places["INBOX_AT"] == 2 * size * 2 * PUSH_CAPACITY


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_no_mode_is_used_beyond_its_buffer(limits: one_shot.Limits) -> None:
    assert limits.push <= PUSH_CAPACITY and max(limits.pull, limits.two_shot) <= CAPACITY


def test_modes_by_size() -> None:
    four = kernels(4)
    limits = LIMITS[4]
    assert four._mode(limits.push) is Mode.PUSH and four._mode(limits.push + 16) is Mode.PULL
    assert four._mode(limits.pull + 16) is Mode.TWO_SHOT
    assert kernels(3)._limits is LIMITS[4] and kernels(5)._limits is LIMITS[8]


@pytest.mark.parametrize(
    ("shape", "dtype", "taken"),
    [
        ((1, 4096), torch.bfloat16, True),
        ((3, 896), torch.float16, True),
        ((1, 4096), torch.float32, False),
        ((1, 4100), torch.bfloat16, False),
        ((2, 4100), torch.bfloat16, False),
        ((3000, 64), torch.bfloat16, False),
        ((1, 32768), torch.bfloat16, False),
        ((0, 4096), torch.bfloat16, False),
        ((4096, 4096), torch.bfloat16, False),
    ],
)
def test_rows_that_are_taken(shape: tuple[int, int], dtype: torch.dtype, taken: bool) -> None:
    assert kernels(2).takes_rows(torch.empty(shape, dtype=dtype)) is taken


def test_unaligned_memory_is_left_to_nccl() -> None:
    assert not kernels(2).takes(torch.empty(17, dtype=torch.bfloat16)[1:])
