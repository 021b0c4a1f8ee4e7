"""The `distllm` command: gathers the subcommands. What they raise ends the job by `comm.fatal`.

Every rank of a job runs this, and rank 0 alone speaks on stdout. A rank learns which it is from the launcher
that started it, before any communicator exists.
"""

from __future__ import annotations

import os
import sys

import click

from distllm import __version__, env
from distllm.cli import logs
from distllm.cli.beam_search import beam_search
from distllm.cli.bench import bench
from distllm.cli.build import build
from distllm.cli.env import show_env
from distllm.cli.generate import generate
from distllm.cli.models import models
from distllm.cli.plan import plan
from distllm.comm import fatal
from distllm.errors import UserError


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="distllm")
@click.pass_context
def cli(context: click.Context) -> None:
    """Run one language model over many MPI ranks: tensor × pipeline parallel, continuous batching.

    One rank: `distllm …`. Four: `mpirun -n 4 distllm … -tp 2 -pp 2`.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (generate, beam_search, build, plan, models, bench, show_env):
    cli.add_command(command)


def main() -> None:
    """The console script. Exit codes: 0; 2, the user can mend it; 130, Ctrl-C; 1, anything else."""
    identity = env.launcher_identity()
    rank = identity.rank if identity else 0
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (open as long as the process lives)
    logs.configure(rank)
    fatal.install()
    try:
        cli.main(prog_name="distllm", standalone_mode=False)
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        raise UserError(one_line(error)) from None


def one_line(error: click.ClickException) -> str:
    text = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    return f"{text} ({context.command_path} --help shows the options)" if context else text
