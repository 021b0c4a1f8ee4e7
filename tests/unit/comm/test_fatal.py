"""How an uncaught exception ends a process: exit code and text, in processes of their own."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tests.launchers import ROOT, clean_environ

ALONE = "from distllm.comm import fatal; from distllm.errors import UserError; fatal.install(); "
JOB = (
    ALONE
    + """
class Control:
    rank, size = RANK, 4
    def last_words(self, text, grace_s): return TEXTS
    def abort(self, code): print('abort', code); raise SystemExit(code)
fatal.install(Control()); fatal.set_step(7)
"""
)


def run(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=clean_environ() | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )


def in_job(statement: str, rank: int = 1, texts: str = "None") -> subprocess.CompletedProcess[str]:
    return run(JOB.replace("RANK", str(rank)).replace("TEXTS", texts) + statement)


def test_user_error_alone() -> None:
    done = run(ALONE + "raise UserError('tp 3: choose 1')")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "distllm: error: tp 3: choose 1\n")


def test_user_error_before_the_job_is_connected_is_told_by_launcher_rank_0() -> None:
    for rank, text in (("0", "distllm: error: no\n"), ("2", "")):
        done = run(ALONE + "raise UserError('no')", OMPI_COMM_WORLD_RANK=rank, OMPI_COMM_WORLD_SIZE="4")
        assert (done.returncode, done.stderr) == (2, text)


def test_user_error_of_all_ranks_is_told_once_by_rank_0() -> None:
    texts = "['a', 'a', 'b', 'a']"
    assert in_job("raise UserError('a')", 0, texts).stderr == "distllm: error: a\ndistllm: error: b\n"
    done = in_job("raise UserError('a')", 1, texts)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_user_error_of_one_rank_aborts() -> None:
    done = in_job("raise UserError('shard 3 is torn')")
    assert (done.returncode, done.stdout) == (2, "abort 2\n")
    assert done.stderr == f"[rank 1 host {socket.gethostname()} step 7] distllm: error: shard 3 is torn\n"


def test_exception_aborts_and_every_line_says_where() -> None:
    done = in_job("raise RuntimeError('bad\\nnews')")
    assert (done.returncode, done.stdout) == (1, "abort 1\n")
    lines = done.stderr.splitlines()
    assert all(line.startswith(f"[rank 1 host {socket.gethostname()} step 7] ") for line in lines)
    assert lines[-2].endswith("RuntimeError: bad") and lines[-1].endswith("news")


def test_exception_alone_is_a_plain_traceback() -> None:
    done = run(ALONE + "raise RuntimeError('bad')")
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "RuntimeError: bad" in done.stderr


@pytest.mark.parametrize(("job", "stdout"), [(False, ""), (True, "abort 130\n")])
def test_interrupt_is_quiet(job: bool, stdout: str) -> None:
    done = in_job("raise KeyboardInterrupt") if job else run(ALONE + "raise KeyboardInterrupt")
    assert (done.returncode, done.stdout, done.stderr) == (130, stdout, "")


def test_broken_transport_while_reporting_still_ends() -> None:
    done = in_job("raise UserError('a')", 1, "1 / 0")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
