"""What a result was measured on: hardware, driver, versions, commit. A fact that cannot be had is None."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from distllm import __version__

PACKAGES = ("torch", "triton", "numpy", "mpi4py", "nccl4py")

Facts = dict[str, str | int | None]


def environment() -> Facts:
    """Facts of this rank's host, in the order in which a reader asks for them."""
    return {
        "distllm": __version__,
        "commit": _commit(),
        **_gpus(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _gpus() -> Facts:
    if not torch.cuda.is_available():
        return {"gpu": None, "gpus": 0}
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpus": torch.cuda.device_count(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def _cpu() -> str | None:
    """The model's name, where the kernel gives one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None


def _commit() -> str | None:
    """Of the checkout that this package is imported from; `-dirty` if tracked files differ from it."""
    here = str(Path(__file__).parent)
    return _output("git", "-C", here, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The first line that a program prints; None if it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None
