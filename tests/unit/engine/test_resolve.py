"""Names to folders, and what a folder's JSON files say."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distllm.engine import eos_token_ids, read_spec, resolve_model
from distllm.errors import CheckpointError


def test_a_folder_is_itself(llama: Path) -> None:
    assert resolve_model(llama) == resolve_model(str(llama)) == llama


def test_bundled_names_are_package_data() -> None:
    assert resolve_model("demo").parts[-3:] == ("distllm", "assets", "demo")


@pytest.mark.parametrize("name", ["no/such/folder", "meta-llama/Llama-3.2-1B", "", "file", "\0"])
def test_no_such_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither config.json nor engine.json"):
        resolve_model(tmp_path)


def test_unreadable_folder(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, since tests may run as root, who reads everything."""

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(CheckpointError, match=r"cannot open the model folder.*Permission denied"):
        resolve_model(llama)


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        (2, None, (2,)),
        ([5, 3], None, (3, 5)),
        (2, [7, 2, 9], (2, 7, 9)),
        (None, 4, (4,)),
        (None, None, ()),
    ],
)
def test_eos_token_ids(copied: Path, config: object, generation: object, wanted: tuple[int, ...]) -> None:
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        file = copied / name
        data = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(data | {"eos_token_id": value}))
    assert eos_token_ids(copied) == wanted


@pytest.mark.parametrize("value", ["</s>", -1, [1, True], 2.0, {}])
def test_bad_eos_token_id(copied: Path, value: object) -> None:
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id"):
        eos_token_ids(copied)


def test_a_spec_is_read_without_torch_and_without_weights(copied: Path) -> None:
    """`distllm plan` needs a config.json and nothing else."""
    (copied / "model.safetensors").unlink()
    assert read_spec(copied).vocab_size == 41
    code = (
        "import sys; from pathlib import Path; from distllm.engine import read_spec, resolve_model;"
        "from distllm.engine.describe import describe;"
        "describe(read_spec(resolve_model(sys.argv[1])), 2, 3);"
        "assert not {'torch', 'safetensors', 'mpi4py'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, copied], check=True, timeout=60)
