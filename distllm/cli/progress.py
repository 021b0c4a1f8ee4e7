"""Progress of long work on stderr: a bar on a terminal, a line now and then elsewhere. Counts bytes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)

LINE_EVERY_S = 5.0


@contextmanager
def show_progress(text: str, rank: int) -> Iterator[Progress | None]:
    """Yield what to call as work proceeds; None on ranks other than 0, which stay silent."""
    if rank > 0:
        yield None
    elif sys.stderr.isatty():
        with _bar(text) as report:
            yield report
    else:
        yield _lines(text)


@contextmanager
def _bar(text: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(text), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(text)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(text: str) -> Progress:
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_EVERY_S:
            last = time.monotonic()
            click.echo(f"{text}: {done / 2**20:.0f} of {total / 2**20:.0f} MiB", err=True)

    return report
