"""Run by mpirun: the peer-memory kernels against fp64, in every mode, eager and in replayed graphs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from distllm.comm.base import Control
from distllm.comm.connect import open_control
from distllm.comm.devices import select_device
from distllm.comm.nccl import NcclComm
from distllm.comm.one_shot import CAPACITY, DTYPES, PUSH_CAPACITY, Limits, Mode, OneShot
from distllm.kernels.reference.norm import add_rms_norm
from tests.comm_contract import ULPS

NUMELS = (8, 24, 2048, 4096, 4104, 40_000, 65_536, 250_000, 1_000_000, 8_388_608, 20_000_008)
ROWS = (
    (1, 4096),
    (3, 4096),
    (7, 896),
    (64, 4096),
    (1, 8192),
    (5, 8192),
    (2, 16384),
    (33, 5120),
    (512, 4096),
    (2048, 4096),
    (5000, 4096),
    (3000, 64),
    (1, 8),
)
EPS = 1e-5
ONLY = {
    Mode.PUSH: Limits(push=PUSH_CAPACITY, pull=0, two_shot=0),
    Mode.PULL: Limits(push=0, pull=4 * CAPACITY, two_shot=0),
    Mode.TWO_SHOT: Limits(push=0, pull=0, two_shot=4 * CAPACITY),
}


def inputs(size: int, seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """What each rank puts in: every rank makes them all."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(shape, generator=generator, device="cuda").mul_(3).to(dtype) for _ in range(size)]


def check_same_bits(control: Control, *tensors: torch.Tensor) -> None:
    data = b"".join(x.cpu().view(torch.uint8).numpy().tobytes() for x in tensors)
    assert len(set(control.all_gather_bytes(hashlib.sha256(data).digest()))) == 1, (
        "ranks disagree on the bits"
    )


def check_sum(found: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """The fp32 sum in rank order, rounded once: exactly."""
    total = parts[0].float()
    for part in parts[1:]:
        total += part
    assert torch.equal(found, total.to(found.dtype))


def check_norm(
    normed: torch.Tensor, total: torch.Tensor, parts: list[torch.Tensor], *rest: torch.Tensor
) -> None:
    residual, weight = rest
    summed = torch.stack(parts).double().sum(0)
    wanted_normed, wanted_total = add_rms_norm(summed, residual.double(), weight.double(), EPS)
    for found, wanted in ((total, wanted_total), (normed, wanted_normed)):
        assert not found.isnan().any()
        assert (found.double() - wanted).norm() / wanted.norm() < ULPS[found.dtype]


def check_plain(control: Control, one_shot: OneShot, dtype: torch.dtype) -> None:
    for seed, numel in enumerate(NUMELS):
        parts = inputs(control.size, seed, (numel,), dtype)
        x = parts[control.rank].clone()
        if one_shot.takes(x):
            assert one_shot.all_reduce(x) is x
            check_sum(x, parts)
            check_same_bits(control, x)


def check_fused(control: Control, one_shot: OneShot, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(ROWS):
        *parts, residual = inputs(control.size + 1, seed, shape, dtype)
        weight = inputs(1, seed + 1000, shape[1:], dtype)[0]
        x = parts[control.rank].clone()
        if one_shot.takes_rows(x):
            normed, total = one_shot.all_reduce_add_norm(x, residual, weight, EPS)
            check_norm(normed, total, parts, residual, weight)
            check_same_bits(control, normed, total)
            assert torch.equal(x, parts[control.rank]), "the input changed"


def capture(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def check_graph(control: Control, one_shot: OneShot) -> None:
    """Chains of different lengths, sizes and modes in two graphs, replayed in turn without a wait between.

    Each link adds the ranks' integers to what the link before left, so one stale read anywhere spoils the
    end.
    """
    shapes = [(1, 4096), (64, 4096), (1, 4096), (200, 4096), (3, 4096)]
    x = torch.zeros(200, 4096, device="cuda", dtype=torch.bfloat16)
    counts = torch.zeros(2, device="cuda", dtype=torch.int64)

    def chain(index: int) -> None:
        for rows, _ in shapes[index:]:
            part = x[:rows].fill_(1).mul_(counts[0] % 50 + control.rank)
            one_shot.all_reduce(part)
            wanted = (counts[0] % 50) * control.size + sum(range(control.size))
            counts[1] += (part != wanted).sum()
            counts[0] += 1

    graphs = [capture(lambda index=index: chain(index)) for index in range(2)]
    for _ in range(500):
        for graph in graphs:
            graph.replay()
    assert counts[1].item() == 0, f"{counts[1].item()} wrong values"


def check_odd(one_shot: OneShot) -> None:
    """What the kernels cannot take goes to NCCL."""
    for shape, dtype in (((7,), torch.bfloat16), ((4096,), torch.float32), ((0,), torch.float16)):
        assert not one_shot.takes(torch.empty(shape, dtype=dtype, device="cuda"))
    longest = max(one_shot._limits.push, one_shot._limits.pull, one_shot._limits.two_shot)
    assert not one_shot.takes(torch.empty(longest // 2 + 8, dtype=torch.bfloat16, device="cuda"))
    assert not one_shot.takes(torch.empty(4097, dtype=torch.bfloat16, device="cuda")[1:])
    assert not one_shot.takes_rows(torch.empty(8, 4100, dtype=torch.bfloat16, device="cuda"))


def main() -> None:
    control = open_control()
    select_device(control)
    comm = NcclComm(control.split(0, control.rank, "tp"), "tp", 20, peer_memory=True)
    one_shot = comm.one_shot
    assert (one_shot is None) == (control.size == 1), "these GPUs do not reach each other's memory"
    if one_shot is not None:
        for limits in (*ONLY.values(), one_shot._limits):
            one_shot._limits = limits
            for dtype in DTYPES:
                check_plain(control, one_shot, dtype)
                check_fused(control, one_shot, dtype)
        check_graph(control, one_shot)
        check_odd(one_shot)
    comm.close()
    print(f"rank {control.rank} passed", flush=True)
    control.close()


if __name__ == "__main__":
    main()
