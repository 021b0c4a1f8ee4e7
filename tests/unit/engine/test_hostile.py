"""Folders that are made to harm: nothing in them is run, nothing outside of them is opened, and what is wrong
with them is one line. Loaded under an audit hook, in a process of its own.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.tokenizers import byte_level, write_json
from tests.unit.engine.test_checkpoint import BAD, WEIGHTS, edit_json

ROOT = Path(__file__).parents[3]
CANARY = "ran"  # appears beside a folder of which something was run


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.place),)


def with_code(folder: Path) -> None:
    """What a trusting loader would run: remote code, pickled weights, in all the names that they go by."""
    canary = folder.parent / CANARY
    code = f"import os\nos.mkdir({str(canary)!r})\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "sitecustomize.py"):
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap(canary)))
    classes = {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}
    edit_json(folder / "config.json", lambda config: config.update(auto_map=classes, trust_remote_code=True))


def with_code_and_no_weights(folder: Path) -> None:
    with_code(folder)
    (folder / WEIGHTS).unlink()


TEMPLATE = "chat_template.jinja"


def write(name: str, content: bytes | str) -> Callable[[Path], object]:
    """The file, and no better one of its kind beside it."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        if name == "tokenizer.model":
            (folder / "tokenizer.json").unlink()

    return damage


def replace_by(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def link_to(name: str, target: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder.parent / "elsewhere").write_text("{}")
        replace_by(name, lambda path: path.symlink_to(target))(folder)

    return damage


def huge(name: str) -> Callable[[Path], object]:
    """Mostly a hole: takes no room on the disk."""

    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(2**40)

    return replace_by(name, make)


def with_tokenizer_code(folder: Path) -> None:
    """And with names of files that lead out."""
    with_code(folder)
    secret = folder.parent / "elsewhere"
    secret.write_text("{}")
    classes = {"AutoTokenizer": ["tokenization_evil.T", None]}
    names = {key: str(secret) for key in ("vocab_file", "tokenizer_file", "name_or_path", "merges_file")}
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(auto_map=classes, **names))


def pickled_model(folder: Path) -> None:
    write("tokenizer.model", pickle.dumps(Trap(folder.parent / CANARY)))(folder)


CHATS: dict[str, tuple[Callable[[Path], object], str]] = {
    "with code": (with_tokenizer_code, "^$"),
    "tokenizer.json cut": (write("tokenizer.json", '{"version": "1.0", "model": {'), "cannot read"),
    "tokenizer.json deep": (write("tokenizer.json", "[" * 10**5), "cannot read"),
    "tokenizer.json huge": (huge("tokenizer.json"), "tokenizer.json is larger than"),
    "tokenizer.model huge": (
        lambda folder: (write("tokenizer.model", b"")(folder), huge("tokenizer.model")(folder)),
        "tokenizer.model is larger than",
    ),
    "tokenizer.model pickled": (pickled_model, "no SentencePiece model"),
    "tokenizer.model damaged": (write("tokenizer.model", b"\x0a\x0e\x0a\x05<unk>"), "no SentencePiece model"),
    **{
        f"{name} is {what}": (damage(name), message)
        for name in ("tokenizer.json", "tokenizer_config.json", TEMPLATE, "added_tokens.json")
        for what, damage, message in (
            ("a link out", lambda name: link_to(name, "../elsewhere"), "lies outside the folder"),
            (
                "a link to nothing outside",
                lambda name: link_to(name, "../nothing"),
                "lies outside the folder",
            ),
            ("a device", lambda name: link_to(name, "/dev/zero"), "lies outside the folder"),
            ("a link to itself", lambda name: link_to(name, name), "cannot read|Symlink loop"),
            ("a pipe", lambda name: replace_by(name, os.mkfifo), "is not a regular file"),
            ("a folder", lambda name: replace_by(name, os.mkdir), "is not a regular file"),
        )
    },
    "template huge": (huge(TEMPLATE), "jinja is larger than"),
    "template binary": (write(TEMPLATE, b"\xff\xfe"), "no UTF-8 text"),
    **{
        f"template {template[:60]}": (write(TEMPLATE, template), message)
        for template, message in (
            ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "reaches for"),
            ("{{ cycler.__init__.__globals__.os.system('id') }}", "reaches for"),
            ("{{ messages.__init__.__globals__ }}", "reaches for"),
            ("{% include '/etc/passwd' %}", "no loader"),
            ("{% import '../elsewhere' as x %}", "no loader"),
            ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
            ("{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 60, "steps"),
            ("{{ range(99999) | join('a' * 99999) }}", "steps"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        )
    },
}


def with_a_trap(folder: Path) -> None:
    """For the careless loader."""
    (folder / "evil.py").write_text("import this_module_is_nowhere")
    (folder / "evil.bin").write_bytes(pickle.dumps(Trap(folder.parent / CANARY)))
    (folder.parent / "secret.safetensors").write_text("secret")


LOADS: dict[str, Callable[[Path], object]] = {kind: damage for kind, (damage, _) in BAD.items()} | {
    "with code": with_code,
    "with code and no weights": with_code_and_no_weights,
}
JOBS = {
    **{("load", kind): damage for kind, damage in LOADS.items()},
    **{("converse", kind): damage for kind, (damage, _) in CHATS.items()},
    ("careless", "trap"): with_a_trap,
}


class Outcome(NamedTuple):
    folder: Path
    error: str
    offences: list[str]

    @property
    def ran(self) -> bool:
        return (self.folder.parent / CANARY).exists()


@pytest.fixture(scope="module")
def outcomes(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Outcome]:
    """Of every job, all in one process."""
    root = tmp_path_factory.mktemp("hostile")
    sound = root / "sound"
    shutil.copytree(llama, sound)
    byte_level(sound)
    write_json(sound / "tokenizer_config.json", {"eos_token": "<|end|>"})
    write(TEMPLATE, "{% for m in messages %}{{ m.content ~ 'x' }}{% endfor %}")(sound)
    folders = {job: root / str(number) / "model" for number, job in enumerate(JOBS)}
    for job, folder in folders.items():
        shutil.copytree(sound, folder)
        JOBS[job](folder)
    arguments = [f"{act}={folder}" for (act, _), folder in folders.items()]
    command = [sys.executable, "-m", "tests.unit.engine.watched", str(sound), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
    results = json.loads(done.stdout)
    return {job: Outcome(folder, *results[str(folder)]) for job, folder in folders.items()}


@pytest.mark.parametrize("kind", LOADS)
def test_weights(outcomes: dict[tuple[str, str], Outcome], kind: str) -> None:
    """Nothing is run, and nothing outside is opened."""
    outcome = outcomes["load", kind]
    assert not outcome.offences and not outcome.ran
    assert bool(outcome.error) == (kind != "with code") and outcome.error.isprintable()


@pytest.mark.parametrize("kind", CHATS)
def test_tokenizers_and_chats(outcomes: dict[tuple[str, str], Outcome], kind: str) -> None:
    outcome = outcomes["converse", kind]
    assert not outcome.offences and not outcome.ran
    assert re.search(CHATS[kind][1], outcome.error) and outcome.error.isprintable()


def test_a_careless_loader_would_be_seen(outcomes: dict[tuple[str, str], Outcome]) -> None:
    outcome = outcomes["careless", "trap"]
    assert outcome.ran
    secret = outcome.folder.parent / "secret.safetensors"
    for event in ("pickle.find_class", "os.mkdir", "compile", "exec", "import", f"open ('{secret}"):
        assert any(offence.startswith(event) for offence in outcome.offences), event
