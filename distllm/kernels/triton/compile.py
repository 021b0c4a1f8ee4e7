"""Compiling kernels side by side: from cold caches a start takes as long as the slowest, not as all of them.

Knows no kernel. Called before steps are captured, which runs each of them once anyway.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from triton import AsyncCompileMode, JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

MAX_THREADS = 16


@contextmanager
def compile_together() -> Iterator[None]:
    """Inside, launching a kernel only asks for it to be compiled; on leaving, all are compiled and loaded.
    Everything else runs, on zeros where kernels would have written.
    """
    with _Loader() as loader, AsyncCompileMode(loader), zero_filled(), _launch_nothing():
        yield


@contextmanager
def zero_filled() -> Iterator[None]:
    """Inside, no tensor that Python allocates holds what was in its memory before: an index that nobody wrote
    is 0, and valid. By names: a dispatch mode would do it, too, and import half a thousand modules first.
    """
    names = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    before = [getattr(owner, name) for owner, name in names]
    for owner, name in names:
        setattr(owner, name, getattr(owner, name.replace("empty", "zeros")))
    try:
        yield
    finally:
        for (owner, name), allocate in zip(names, before, strict=True):
            setattr(owner, name, allocate)


class _Loader(ThreadPoolExecutor):
    def __init__(self) -> None:
        device = torch.cuda.current_device()  # a new thread's would be the first of this process
        threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
        super().__init__(threads, initializer=torch.cuda.set_device, initargs=(device,))

    def submit(self, compile: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]
        return super().submit(_load, compile)


def _load(compile: Callable[[], Any]) -> Any:
    kernel = compile()
    _ = kernel.run  # reading it builds the launcher and loads the binary, which a capture must not do
    return kernel


@contextmanager
def _launch_nothing() -> Iterator[None]:
    launch, asked = JITFunction.run, set()

    def ask(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        # Triton takes a millisecond to see that a kernel is already being compiled, and launches are many.
        kinds = (arg if p.is_constexpr else _kind(arg) for p, arg in zip(self.params, args, strict=False))
        case = id(self), *kinds, *options.items()
        if case not in asked:
            asked.add(case)
            launch(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = ask
    try:
        yield
    finally:
        JITFunction.run = launch


def _kind(arg: Any) -> object:
    """What a kernel is compiled for, or more, of an argument that is no constant."""
    if type(arg) is int:
        return arg == 1, arg % 16 == 0, arg.bit_length() > 31
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16
    if isinstance(arg, TensorDescriptor):
        return arg.base.dtype, *arg.block_shape
    return arg
