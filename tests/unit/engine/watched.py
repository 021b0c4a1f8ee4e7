"""Loads model folders under an audit hook and prints, for each, the error and what the interpreter did
meanwhile that loading, or a chat, has no need of. Run by test_hostile.py, in a process of its own.

    python -m tests.unit.engine.watched WARM-UP load=FOLDER converse=FOLDER careless=FOLDER …
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import jinja2.debug  # noqa: F401 - imported when a template fails
import sentencepiece  # noqa: F401 - imported when there is a tokenizer.model
import torch

from distllm.engine import eos_token_ids, load_weights, open_source, resolve_model
from distllm.engine.chat import Chat, load_chat_format
from distllm.engine.tokenizers import load_tokenizer
from distllm.errors import UserError
from distllm.models.shards import shard_table
from distllm.parallel.layout import RankLayout

LOOKS = {"os.listdir", "os.scandir", "open"}  # of these, where is checked
HARMLESS = {"_thread.start_new_thread", "pathlib.Path.glob"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Watch:
    """What happens between start and stop."""

    def __init__(self) -> None:
        self.home: str | None = None  # the folder that is being loaded
        self.offences: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[object, ...]) -> None:
        if self.home is None or event in HARMLESS or (event in LOOKS and self._is_inside(args)):
            return
        if is_template(event, args):
            return
        home, self.home = self.home, None  # what follows is ours
        self.offences.append(f"{event} {args}")
        self.home = home

    def _is_inside(self, args: tuple[object, ...]) -> bool:
        home, self.home = self.home, None
        real, flags = os.path.realpath(os.fspath(args[0])), args[2] if len(args) > 2 else 0  # type: ignore
        self.home = home
        return not int(flags) & WRITING and f"{real}/".startswith(f"{home}/")  # type: ignore[call-overload]

    def during(self, home: Path, load: Callable[[Path], object]) -> tuple[str, list[str]]:
        self.offences = []
        self.home, error = os.path.realpath(home), ""
        try:
            load(home)
        except UserError as caught:
            error = str(caught)
        self.home = None
        return error, self.offences


def is_template(event: str, args: tuple[object, ...]) -> bool:
    """Jinja compiles a template to Python, and its traceback to one of the template's lines. What the
    template then does is watched as all else is.
    """
    if event == "object.__getattr__":
        return args[1] in ("tb_frame", "f_code")
    if event in ("compile", "code.__new__"):
        return args[1] == "<template>"
    return event == "exec" and getattr(args[0], "co_filename", "") == "<template>"


def load(folder: Path) -> None:
    source = open_source(resolve_model(folder))
    eos_token_ids(folder)
    load_weights(source, shard_table(source.spec, RankLayout()), torch.float32, torch.device("cpu"))


def converse(folder: Path) -> None:
    """What is loaded for chats, and one of them."""
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    tokenizer.decode(tokenizer.encode("abc <|end|>"))
    chat = load_chat_format(folder, tokenizer)
    assert chat is not None
    chat.render(Chat([{"role": "user", "content": "abc"}]))


def careless(folder: Path) -> None:
    """What must not happen, to see that it is seen."""
    for file in folder.glob("*.bin"):
        with file.open("rb") as opened:
            pickle.load(opened)
    for file in folder.parent.glob("*.safetensors"):
        file.read_bytes()
    for file in folder.glob("*.py"):
        with contextlib.suppress(ImportError):
            runpy.run_path(str(file))


def main() -> None:
    warm_up, *jobs = sys.argv[1:]
    watch, acts = Watch(), {"load": load, "converse": converse, "careless": careless}
    load(Path(warm_up))  # what is imported on first use is imported now
    converse(Path(warm_up))
    pairs = [job.split("=", 1) for job in jobs]
    print(json.dumps({folder: watch.during(Path(folder), acts[act]) for act, folder in pairs}))


if __name__ == "__main__":
    main()
