"""Tables on stdout: ruled on a terminal, aligned columns for everything that reads a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    cells = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_ruled(title, header, cells)
    else:
        _print_plain(title, [list(header), *cells])


def _print_ruled(title: str, header: Sequence[str], cells: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, title=title, title_justify="left")
    for row in cells:
        table.add_row(*row)
    Console().print(table)


def _print_plain(title: str, lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    click.echo(f"\n{title}")
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  " + "  ".join(padded).rstrip())
