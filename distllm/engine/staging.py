"""All or nothing on disk: a folder is filled beside its target and renamed when complete. Knows no weights.

So whatever stood at the target is whole until the new engine is, and after any failure still.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distllm.engine.format import ENGINE_JSON
from distllm.errors import UserError

COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "qwen.tiktoken",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_RANK_FILE = re.compile(r"rank\d{2,}\.safetensors")


def begin(out: Path) -> Path:
    """Check the target and make the folder beside it that `commit` will put in its place."""
    _check_target(out)
    partial = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    with writing(out):
        partial.mkdir()
    return partial


def commit(partial: Path, out: Path) -> None:
    """Rename the finished folder over the old one, which comes back if that fails."""
    old = out.with_name(f".{out.name}.old-{secrets.token_hex(4)}")
    if out.exists():
        os.rename(out, old)
    try:
        os.rename(partial, out)
    except OSError:
        if old.exists():
            os.rename(old, out)
        raise
    if old.exists():
        _remove(old, out)


def _remove(old: Path, out: Path) -> None:
    try:
        shutil.rmtree(old)
    except OSError as error:
        raise UserError(f"{out} is complete, but cannot remove {old}: {error.strerror}; delete it") from error


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """What the file system refuses is the user's to mend: a full disk, a quota, a missing permission."""
    try:
        yield
    except OSError as error:
        file = f" ({error.filename})" if error.filename else ""
        raise UserError(
            f"cannot write the engine {out}: {error.strerror}{file}; nothing was changed; "
            f"make room or choose another -o"
        ) from error


def _check_target(out: Path) -> None:
    """A build replaces an engine, or fills what is missing or empty; it never deletes anything else."""
    with writing(out):
        if not out.parent.is_dir():
            raise UserError(f"cannot build {out}: the folder {out.parent} does not exist; make it first")
        if not out.exists():
            return
        if not out.is_dir():
            raise UserError(f"cannot build {out}: it is a file; choose another -o")
        names = sorted(entry.name for entry in out.iterdir())
    foreign = [name for name in names if not _is_ours(name)]
    if foreign:
        raise UserError(f"cannot build {out}: it holds {foreign[0]}, which would be lost; choose another -o")
    if names and ENGINE_JSON not in names:
        raise UserError(f"cannot build {out}: it is neither empty nor an engine; choose another -o")


def _is_ours(name: str) -> bool:
    return name == ENGINE_JSON or name in COPIED or _RANK_FILE.fullmatch(name) is not None
