"""Which GPU a rank gets, and what a launch that shares one is told, without any GPU."""

from __future__ import annotations

import pytest
import torch

from distllm import env
from distllm.comm.connect import open_channels
from distllm.comm.devices import Seat, check_seats, select_device
from distllm.comm.local import LocalControl, run_ranks
from distllm.errors import ConfigError, LaunchError
from distllm.parallel.layout import RankLayout

CPU = Seat("one", "cpu", "")


def seats(*places: str) -> list[Seat]:
    """From "host:uuid"."""
    pairs = [place.split(":") for place in places]
    return [Seat(host, f"cuda:0 H100 {uuid}", uuid) for host, uuid in pairs]


@pytest.mark.parametrize("fine", [[CPU], [CPU, CPU], seats("a:1", "a:2", "b:1", "b:2")])
def test_one_gpu_each_or_none_at_all(fine: list[Seat]) -> None:
    check_seats(fine)


def test_a_shared_gpu_is_refused_with_the_map() -> None:
    with pytest.raises(LaunchError, match=r"ranks \[0, 2\] share a GPU") as refusal:
        check_seats(seats("a:1", "node-b:1", "a:1"))
    lines = str(refusal.value).splitlines()[1:]
    assert lines == [
        "  rank 0   a       cuda:0 H100 1",
        "  rank 1   node-b  cuda:0 H100 1",
        "  rank 2   a       cuda:0 H100 1",
    ]


def test_some_ranks_without_a_gpu_are_refused() -> None:
    with pytest.raises(LaunchError, match=r"ranks \[1\] see no GPU.*DISTLLM_DEVICE=cpu"):
        check_seats([*seats("one:1"), CPU])


@pytest.mark.parametrize(("num_visible", "wanted"), [(1, [0, 0, 0]), (3, [0, 1, 2]), (8, [0, 1, 2])])
def test_by_node_local_rank(monkeypatch: pytest.MonkeyPatch, num_visible: int, wanted: list[int]) -> None:
    """Whether a process sees one bound GPU or all of the host's."""
    from distllm.comm import devices

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_visible)
    assert [devices._own_device(local_rank).index for local_rank in range(3)] == wanted


def test_the_cpu_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(env, "gpus_disabled", lambda: True)
    assert run_ranks(2, select_device) == [torch.device("cpu")] * 2


def test_the_setting() -> None:
    assert [env.gpus_disabled(environ) for environ in ({}, {"DISTLLM_DEVICE": "cpu"})] == [False, True]
    with pytest.raises(ConfigError, match="DISTLLM_DEVICE is 'gpu'"):
        env.gpus_disabled({"DISTLLM_DEVICE": "gpu"})


def test_channels_on_a_gpu_are_local_for_one_rank() -> None:
    channels = open_channels(LocalControl(), RankLayout(), torch.device("cuda", 0))
    x = torch.ones(3)
    assert channels.tp.all_reduce(x) is x and channels.pipe.all_gather(x).shape == (1, 3)
    channels.close()
