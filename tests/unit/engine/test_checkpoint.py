"""Hugging Face folders: slices against the whole tensors, and every way in which a folder can be bad."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distllm.engine import files, load_weights, open_source, resolve_model
from distllm.engine.checkpoint import HFCheckpoint
from distllm.errors import CheckpointError
from distllm.models.shards import shard_table
from distllm.parallel.layout import RankLayout
from tests.checkpoints import make_llama

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def test_reads_slices_of_the_stored_tensors(llama: Path) -> None:
    source, stored = open_source(llama), load_file(llama / WEIGHTS)
    q = stored["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(source.read("layers.1.attn.q.weight", 0, 5, 17), q[5:17])
    o = stored["model.layers.2.self_attn.o_proj.weight"]
    assert torch.equal(source.read("layers.2.attn.o.weight", 1, 3, 11), o[:, 3:11])
    assert torch.equal(source.read("head.weight", 0, 0, 41), stored["lm_head.weight"])


def test_sharded_checkpoint_reads_alike(llama: Path, tmp_path: Path) -> None:
    """Files in the index's order, tensors in the files' order."""
    folder = tmp_path / "sharded"
    model = make_llama(folder)
    single, sharded = tmp_path / "single", tmp_path / "many"
    model.save_pretrained(single)
    model.save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    one, many = HFCheckpoint(single), HFCheckpoint(sharded)
    for slot, shape in many._shapes.items():
        assert torch.equal(one.read(slot, 0, 0, shape[0]), many.read(slot, 0, 0, shape[0]))
    files = json.loads((sharded / INDEX).read_text())["weight_map"]
    by_position = sorted(many._shapes, key=many.position)
    order = [files[many._names[slot]] for slot in by_position]
    assert len(list(dict.fromkeys(order))) == sum(a != b for a, b in zip(order, [None, *order], strict=False))


@pytest.mark.parametrize("size", ["40KB", "1GB"])
def test_loading_reads_forward(tmp_path: Path, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's slices in the order in which they lie on disk, each once."""
    make_llama(tmp_path / "model").save_pretrained(tmp_path / "cut", max_shard_size=size)
    source = HFCheckpoint(tmp_path / "cut")
    seen: list[tuple[int, int]] = []
    real = source.read
    monkeypatch.setattr(
        source, "read", lambda slot, *at: seen.append(source.position(slot)) or real(slot, *at)
    )
    load_weights(source, shard_table(source.spec, RankLayout(2, 1)), torch.float32, torch.device("cpu"))
    assert seen == sorted(set(seen)) and len(seen) == len(source._shapes)


def test_links_into_a_hub_cache_are_followed(copied: Path, tmp_path: Path) -> None:
    """snapshots/REVISION/file → ../../blobs/HASH, as download caches keep them."""
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", WEIGHTS):
        (copied / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert open_source(resolve_model(snapshot)).spec.vocab_size == 41


def edit_json(file: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def use_index(folder: Path, file: str) -> None:
    names = dict.fromkeys(load_file(folder / WEIGHTS), file)
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def drop_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def pickled_only(folder: Path) -> None:
    drop_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def truncate(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100)


def link_out(folder: Path) -> None:
    use_index(folder, "inner.safetensors")
    (folder / "inner.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def not_a_map(folder: Path) -> None:
    drop_weights(folder)
    (folder / INDEX).write_text("{}")


def a_tensor_less_in_the_index(folder: Path) -> None:
    use_index(folder, "a.safetensors")
    edit_json(folder / INDEX, lambda data: data["weight_map"].pop("model.norm.weight"))


def index_names_another_file(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    names = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: tensor for name, tensor in tensors.items() if names[name] != file}, folder / file)
    drop_weights(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


BAD = {
    "no weights": (drop_weights, "neither model.safetensors nor model.safetensors.index.json"),
    "pickled": (pickled_only, "only pickled weights"),
    "truncated": (truncate, "model.safetensors is damaged or incomplete"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "damaged or incomplete"),
    "garbage": (lambda f: (f / WEIGHTS).write_bytes(b"x" * 999), "damaged or incomplete"),
    "folder for a file": (lambda f: (drop_weights(f), (f / WEIGHTS).mkdir()), "model.safetensors"),
    "tensor missing": (
        lambda f: edit_weights(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "has no tensor model.layers.1.mlp.up_proj.weight",
    ),
    "head missing": (
        lambda f: edit_weights(f, lambda t: t.pop("lm_head.weight")),
        "no tensor lm_head.weight",
    ),
    "shape": (
        lambda f: edit_weights(f, lambda t: t.update({"model.norm.weight": torch.zeros(29)})),
        r"model.norm.weight has shape \[29\]; config.json asks for \[30\]",
    ),
    "integers": (
        lambda f: edit_weights(f, lambda t: t.update({"model.norm.weight": torch.zeros(30).char()})),
        "model.norm.weight is stored as I8",
    ),
    "config against weights": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(num_key_value_heads=3)),
        "k_proj.weight has shape",
    ),
    "config missing": (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{,}"), "config.json is not valid JSON"),
    "config binary": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe"),
        "config.json is not valid JSON",
    ),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
    "deep": (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json is not valid JSON"),
    "architecture": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(architectures=["OPTForCausalLM"])),
        "OPTForCausalLM.*not supported; supported: LlamaForCausalLM",
    ),
    "index without map": (not_a_map, "has no weight_map"),
    "index lacks a tensor": (a_tensor_less_in_the_index, "lists no tensor model.norm.weight"),
    "index names another file": (index_names_another_file, r"a.safetensors has no tensor model.embed_tokens"),
    "file of index missing": (lambda f: use_index(f, "gone.safetensors"), "gone.safetensors"),
    "index leads up": (lambda f: use_index(f, "../elsewhere.safetensors"), "outside the folder"),
    "index is absolute": (lambda f: use_index(f, "/etc/passwd"), "outside the folder"),
    "index names no file": (lambda f: use_index(f, 7), "7 is not a file name"),  # type: ignore[arg-type]
    "link leads out": (link_out, "outside the folder"),
}


def test_json_of_any_size_is_not_read(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 99)
    with pytest.raises(CheckpointError, match=r"config.json is larger than 99 bytes"):
        open_source(copied)


@pytest.mark.parametrize("kind", BAD)
def test_bad_folder_is_one_clear_line(copied: Path, kind: str) -> None:
    damage, text = BAD[kind]
    damage(copied)
    with pytest.raises(CheckpointError, match=text) as caught:
        open_source(copied)
    assert "\n" not in str(caught.value)
