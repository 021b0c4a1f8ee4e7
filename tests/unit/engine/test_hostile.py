"""Folders that are made to harm: nothing in them is run, nothing outside of them is opened, and what is wrong
with them is one line. Loaded under an audit hook, in a process of its own.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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


def watched(how: str, warm_up: Path, folders: list[Path]) -> dict[str, tuple[str, list[str]]]:
    command = [sys.executable, "-m", "tests.unit.engine.watched", how, str(warm_up), *map(str, folders)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture
def make_folder(llama: Path, tmp_path: Path) -> Callable[[Callable[[Path], object]], Path]:
    def make(damage: Callable[[Path], object]) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "model"
        shutil.copytree(llama, folder)
        damage(folder)
        return folder

    return make


def test_nothing_is_run_and_nothing_outside_is_opened(
    llama: Path, make_folder: Callable[[Callable[[Path], object]], Path]
) -> None:
    cases = {kind: damage for kind, (damage, _) in BAD.items()} | {
        "with code": with_code,
        "with code and no weights": with_code_and_no_weights,
    }
    folders = {kind: make_folder(damage) for kind, damage in cases.items()}
    results = watched("load", llama, list(folders.values()))
    for kind, folder in folders.items():
        error, offences = results[str(folder)]
        assert not offences, f"{kind}: {offences}"
        assert not (folder.parent / CANARY).exists(), kind
        assert bool(error) == (kind != "with code") and error.isprintable(), f"{kind}: {error!r}"


def test_a_careless_loader_would_be_seen(
    llama: Path, make_folder: Callable[[Callable[[Path], object]], Path]
) -> None:
    folder = make_folder(lambda folder: (folder / "evil.py").write_text("import this_module_is_nowhere"))
    canary, secret = folder.parent / CANARY, folder.parent / "secret.safetensors"
    (folder / "evil.bin").write_bytes(pickle.dumps(Trap(canary)))
    secret.write_text("secret")
    ((_, offences),) = watched("careless", llama, [folder]).values()
    assert canary.exists()
    for event in ("pickle.find_class", "os.mkdir", "compile", "exec", "import", f"open ('{secret}"):
        assert any(offence.startswith(event) for offence in offences), event
