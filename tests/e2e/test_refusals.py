"""Bad input, on one rank: exit code 2, one line that names what is wrong, nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command import check_refused, distllm, generate_ids

Edit = Callable[[Path], None]


# The command line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate", "demo", "--promt", "x"], ["--promt", "generate --help"]),
        (["generate"], ["MODEL"]),
        (["generate", "demo"], ["--prompt"]),
        (["generate", "demo", "--prompt", "x", "--prompt-token-ids", "1"], ["not both"]),
        (["generate", "demo", "--prompt", "x", "--prompt", "y", "--stream"], ["--json"]),
        (["generate", "demo", "--prompt-token-ids", "1,x"], ["'x'", "5,17,9"]),
        (["generate", "demo", "--prompt", "x", "--dtype", "int8"], ["int8", "bfloat16"]),
        (["generate", "demo", "--prompt", "x", "--temperature", "hot"], ["hot"]),
        (["serv"], ["serv"]),
    ],
)
def test_wrong_usage(args: list[str], words: list[str]) -> None:
    check_refused(distllm(*args), *words)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--temperature", "-1"], ["temperature is -1.0", "0.0"]),
        (["--temperature", "nan"], ["temperature is nan"]),
        (["--top-p", "1.5"], ["top_p is 1.5", "1.0"]),
        (["--max-tokens", "0"], ["max_tokens is 0"]),
        (["--n", "0"], ["n is 0"]),
        (["--logprobs", "999"], ["logprobs is 999", "20"]),
        (["--max-num-seqs", "0"], ["max_num_seqs is 0"]),
        (["-tp", "0"], ["tp"]),
        (["--max-model-len", "4096"], ["4096", "256"]),
        (["--max-model-len", "3"], ["3 tokens", "max_model_len is 3"]),
        (["-tp", "2", "-pp", "2"], ["4 ranks", "mpirun -n 4"]),
    ],
)
def test_options_out_of_bounds(tiny: Path, args: list[str], words: list[str]) -> None:
    check_refused(distllm("generate", tiny, "--prompt-token-ids", "5,6,7", *args), *words)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (["--prompt-token-ids", "131"], ["131", "130"]),
        (["--prompt-token-ids=-1"], ["-1"]),
        (["--prompt", "text"], ["tokenizer.json", "token ids"]),
        (["--prompt", ""], ["empty"]),
        (["--prompt-token-ids", ",".join(["5"] * 256)], ["256 tokens", "max_model_len is 256"]),
    ],
)
def test_prompts_that_cannot_run(tiny: Path, prompt: list[str], words: list[str]) -> None:
    check_refused(generate_ids(tiny, *prompt), *words)


# Model folders


def edit_config(**changes: object) -> Edit:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def truncate_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), ["safetensors"]),
        (truncate_weights, ["model.safetensors"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), ["model.safetensors"]),
        (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "JSON"]),
        (edit_config(architectures=["MambaForCausalLM"], model_type="mamba"), ["Mamba", "Llama"]),
        (edit_config(num_hidden_layers=6), ["layers.5"]),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), ["tokenizer.json"]),
    ],
    ids=["missing", "truncated", "empty", "no config", "bad JSON", "unknown", "too few layers", "tokenizer"],
)
def test_damaged_folders(copy: Path, edit: Edit, words: list[str]) -> None:
    edit(copy)
    check_refused(generate_ids(copy, "--prompt-token-ids", "5"), *words)


@pytest.mark.parametrize("command", ["generate", "build", "plan"])
def test_folder_that_is_not_there(command: str, tmp_path: Path) -> None:
    extra = {"generate": ["--prompt", "x"], "build": ["-o", str(tmp_path / "out")], "plan": []}[command]
    check_refused(distllm(command, tmp_path / "nowhere", *extra), "nowhere")
    assert not (tmp_path / "out").exists()


def test_folder_that_may_not_be_read(copy: Path) -> None:
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("root may read every folder, and setpriv (util-linux) is not here to take that from it")
    prefix = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    copy.chmod(0)
    done = distllm("generate", copy, "--prompt-token-ids", "5", prefix=prefix)
    copy.chmod(0o755)
    check_refused(done, str(copy), "Permission denied")


@pytest.mark.parametrize("command", ["build", "plan"])
@pytest.mark.parametrize(
    ("args", "words"), [(["-tp", "3"], ["tp 3", "8"]), (["-pp", "6"], ["pp 6", "5 layers"])]
)
def test_layout_that_the_model_does_not_fit(
    tiny: Path, tmp_path: Path, command: str, args: list[str], words: list[str]
) -> None:
    extra = ["-o", str(tmp_path / "out")] if command == "build" else []
    check_refused(distllm(command, tiny, *args, *extra), *words)
    assert not list(tmp_path.iterdir())


# Building


def limit_file_size() -> None:
    """A disk that is full after 200 kB, as far as one process can see."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "small", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount; test_file_size_limit_keeps_the_old_engine covers the same path")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_full_disk_leaves_nothing_behind(tiny: Path, small_disk: Path) -> None:
    done = distllm("build", tiny, "-o", small_disk / "engine")
    check_refused(done, str(small_disk / "engine"), "No space left")
    assert not list(small_disk.iterdir())


def test_file_size_limit_keeps_the_old_engine(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    assert distllm("build", tiny, "-o", out).returncode == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    check_refused(distllm("build", tiny, "-o", out, "-tp", 2, preexec_fn=limit_file_size), str(out))
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["engine"]


def test_a_folder_that_is_no_engine_is_not_overwritten(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    check_refused(distllm("build", tiny, "-o", tmp_path), str(tmp_path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
