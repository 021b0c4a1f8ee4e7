"""How a job ends when it cannot go on: one rank's uncaught exception is everybody's end.

Without this, Python leaves for MPI_Finalize on the failed rank and every rank waits for ever. Process-wide,
as sys.excepthook is. The command line and open_control() call `install`, the loops call `set_step`. Knows
Control; not MPI.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from types import TracebackType
from typing import NoReturn

from distllm import env
from distllm.comm.base import Control
from distllm.errors import UserError

USER_ERROR_CODE = 2
INTERRUPT_CODE = 130
MEETING_S = 3.0  # a UserError that every rank finds is found within this time on all of them
PRINT_S = 1.0  # for rank 0 to print: the first rank that exits makes the launcher kill the others

_control: Control | None = None
_step: int | None = None


def install(control: Control | None = None) -> None:
    """Let every uncaught exception end the whole job. Called at the start, and again when control is open."""
    global _control
    _control = control
    sys.excepthook = _excepthook


def set_step(step: int) -> None:
    """Say which step this rank is in, for the messages of a failure."""
    global _step
    _step = step


def where() -> str:
    """`[rank r host h step n]` of this rank, as far as it is known."""
    rank = _control.rank if _control else _launcher_rank()
    step = "-" if _step is None else _step
    return f"[rank {rank} host {os.uname().nodename} step {step}]"


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    try:
        if isinstance(error, UserError):
            _end_refused(error)
        if isinstance(error, KeyboardInterrupt):
            _end_interrupted()
        _end_failed(error)
    except SystemExit:
        raise
    except BaseException as second:
        # The transport broke while we reported, or a second Ctrl-C; atexit would wait for peers in vain.
        _print(traceback.format_exception(second))
        os._exit(1)


def _end_refused(error: UserError) -> NoReturn:
    """One line from rank 0 and exit code 2, when every rank refuses; else from the ranks that do."""
    if _control is None:
        if _launcher_rank() == 0:
            _print([f"distllm: error: {error}\n"])
        elif _launcher_size() > 1:
            time.sleep(PRINT_S)
        sys.exit(USER_ERROR_CODE)
    texts = _control.last_words(str(error), MEETING_S)
    if texts is None:
        _print([f"{where()} distllm: error: {error}\n"])
        _control.abort(USER_ERROR_CODE)
    if _control.rank == 0:
        _print([f"distllm: error: {text}\n" for text in dict.fromkeys(texts)])
    sys.exit(USER_ERROR_CODE)


def _end_interrupted() -> NoReturn:
    """Quietly. As a rule the launcher got the same Ctrl-C and ends the job during the grace of abort()."""
    if _control is not None:
        _control.abort(INTERRUPT_CODE)
    sys.exit(INTERRUPT_CODE)


def _end_failed(error: BaseException) -> NoReturn:
    """The traceback, every line with rank, host and step, then the end of all ranks."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    prefix = f"{where()} " if _launcher_size() > 1 or (_control and _control.size > 1) else ""
    _print([f"{prefix}{line}\n" for line in lines])
    if _control is not None:
        _control.abort(1)
    sys.exit(1)


def _print(lines: list[str]) -> None:
    """In one write, so that the lines of several ranks do not mix."""
    sys.stdout.flush()
    sys.stderr.write("".join(lines))
    sys.stderr.flush()


def _launcher_rank() -> int:
    identity = env.launcher_identity()
    return identity.rank if identity else 0


def _launcher_size() -> int:
    identity = env.launcher_identity()
    return identity.size or 1 if identity else 1
