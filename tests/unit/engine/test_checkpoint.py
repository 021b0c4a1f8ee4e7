"""Hugging Face folders: slices against the whole tensors, and every way in which a folder can be bad."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distllm.engine import files, load_weights, open_source, reader, resolve_model
from distllm.errors import CheckpointError
from distllm.models.shards import shard_table
from distllm.parallel.layout import RankLayout
from tests.checkpoints import make_llama

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


CPU = torch.device("cpu")


def test_shards_are_slices_of_the_stored_tensors(llama: Path) -> None:
    """The last of six ranks: one head, KV head 1 of 2, the end of the vocabulary with its padding."""
    stored, source = load_file(llama / WEIGHTS), open_source(llama)
    weights = load_weights(source, shard_table(source.spec, RankLayout(6, 1, rank=5)), torch.float32, CPU)
    at = "model.layers.1.self_attn."
    k, v = stored[at + "k_proj.weight"], stored[at + "v_proj.weight"]
    q = stored[at + "q_proj.weight"][30:36]
    assert torch.equal(weights["layers.1.attn.qkv.weight"], torch.cat([q, k[6:12], v[6:12]]))
    assert torch.equal(weights["layers.1.attn.o.weight"], stored[at + "o_proj.weight"][:, 30:36])
    assert torch.equal(weights["layers.1.attn.o.bias"], stored[at + "o_proj.bias"])
    assert torch.equal(weights["head.weight"][:6], stored["lm_head.weight"][35:41])
    assert weights["head.weight"].shape == (7, 30) and not weights["head.weight"][6].any()


def test_a_checkpoint_in_many_files_loads_alike(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = open_source(tmp_path / "one"), open_source(tmp_path / "many")
    shards = shard_table(one.spec, RankLayout(2, 1, rank=1))
    a, b = (load_weights(source, shards, torch.float32, CPU) for source in (one, many))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("size", ["40KB", "1GB"])
def test_loading_reads_forward_and_only_what_it_needs(
    tmp_path: Path, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File after file, each from front to back; a rank of two reads its rows, and all of what is cut by
    columns.
    """
    make_llama(tmp_path / "model").save_pretrained(tmp_path / "cut", max_shard_size=size)
    source = open_source(tmp_path / "cut")
    shards = shard_table(source.spec, RankLayout(2, 1))
    seen: list[tuple[str, int]] = []
    num_read, real = 0, os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal num_read
        seen.append((os.readlink(f"/proc/self/fd/{descriptor}"), offset))
        num_read += buffers[0].nbytes
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(reader, "NUM_THREADS", 1)
    weights = load_weights(source, shards, torch.float32, CPU)
    num_files = len(list((tmp_path / "cut").glob("*.safetensors")))
    assert seen == sorted(set(seen)) and len({file for file, _ in seen}) == num_files
    by_columns = [weights[f"layers.{n}.{name}.weight"] for n in range(5) for name in ("attn.o", "mlp.down")]
    assert num_read == sum(weight.nbytes for weight in [*weights.values(), *by_columns])


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


def replace_header(folder: Path, change: Callable[[str], str]) -> None:
    """Rewrite the header, and leave the tensors' bytes as they are."""
    content = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    text = change(content[8:end].decode()).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def edit_header(folder: Path, change: Callable[[dict], object]) -> None:
    def edited(text: str) -> str:
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    replace_header(folder, edited)


def edit_entry(key: str, value: object) -> Callable[[Path], None]:
    return lambda folder: edit_header(folder, lambda header: header["model.norm.weight"].update({key: value}))


def overlap(header: dict) -> None:
    header["model.norm.weight"]["data_offsets"] = header["lm_head.weight"]["data_offsets"]


def header_length(length: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / WEIGHTS).open("r+b") as file:
            file.write(length.to_bytes(8, "little"))

    return change


def name_twice(folder: Path) -> None:
    again = '{"model.norm.weight":{"dtype":"F32","shape":[30],"data_offsets":[0,120]},'
    replace_header(folder, lambda text: again + text[1:])


def rename_a_tensor(folder: Path) -> None:
    edit_header(folder, lambda header: header.update({"\n\x1b[2J" * 999: header.pop("model.norm.weight")}))


def pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def index_is_a_pipe(folder: Path) -> None:
    drop_weights(folder)
    pipe(INDEX)(folder)


def to_link(name: str, target: str) -> Callable[[Path], None]:
    """The file moves out, and a link stays."""

    def change(folder: Path) -> None:
        if (folder / name).exists():
            (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(target)

    return change


def index_is_a_link(folder: Path) -> None:
    use_index(folder, "a.safetensors")
    to_link(INDEX, "../elsewhere")(folder)


def folder_links_out(folder: Path) -> None:
    use_index(folder, "sub/elsewhere.safetensors")
    (folder / "sub").symlink_to(folder.parent)


def links_in_a_circle(folder: Path) -> None:
    use_index(folder, "a")
    (folder / "a").symlink_to("a")


BAD = {
    "header beyond the file": (
        header_length(2**63),
        "incomplete: a header of 9223372036854775808 bytes in",
    ),
    "header of all bits": (header_length(2**64 - 1), "a header of 18446744073709551615 bytes"),
    "header of none": (header_length(0), "a header of 0 bytes"),
    "header cut": (header_length(100), "damaged or incomplete"),
    "a tensor twice": (name_twice, "the header says model.norm.weight twice"),
    "a key twice": (
        lambda f: replace_header(f, lambda text: text.replace('"shape":', '"shape":[1],"shape":', 1)),
        "the header says shape twice",
    ),
    "a tensor's name is not one line": (rename_a_tensor, "no tensor model.norm.weight"),
    "an odd tensor is in the way": (
        lambda f: edit_header(f, lambda header: header.update({"\n\x1b" * 999: header["model.norm.weight"]})),
        r"'\\n\\x1b.*' starts at byte",
    ),
    "an odd tensor has no shape": (
        lambda f: edit_header(f, lambda header: header.update({"\n" * 9999: {}})),
        r"'\\n\\n.*' has no dtype, shape",
    ),
    "header a list": (
        lambda f: (f / WEIGHTS).write_bytes((2).to_bytes(8, "little") + b"[]"),
        "the header holds a list",
    ),
    "header deep": (
        lambda f: (f / WEIGHTS).write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5),
        "damaged or incomplete",
    ),
    "overlap": (lambda f: edit_header(f, overlap), "damaged or incomplete: .* starts at byte"),
    "gap": (
        lambda f: edit_header(f, lambda header: header.pop("model.norm.weight")),
        "damaged or incomplete",
    ),
    "longer": (lambda f: (f / WEIGHTS).open("ab").write(b"\0"), "damaged or incomplete: .* bytes instead of"),
    "negative offset": (edit_entry("data_offsets", [-120, 0]), "norm.weight has a shape or data_offsets"),
    "offsets turned": (edit_entry("data_offsets", [120, 0]), "norm.weight has a shape or data_offsets"),
    "one offset": (edit_entry("data_offsets", [0]), "norm.weight has no dtype, shape and data_offsets"),
    "offset beyond the file": (edit_entry("data_offsets", [0, 2**70]), "damaged or incomplete"),
    "offset not a number": (edit_entry("data_offsets", ["0", 1]), "norm.weight has a shape or data_offsets"),
    "negative shape": (edit_entry("shape", [-30]), "norm.weight has a shape or data_offsets"),
    "truth for a number": (edit_entry("shape", [True]), "norm.weight has a shape or data_offsets"),
    "fraction": (edit_entry("shape", [30.0]), "norm.weight has a shape or data_offsets"),
    "shape beyond 64 bits": (edit_entry("shape", [2**63, 2**63]), "norm.weight has shape"),
    "shape of many dimensions": (edit_entry("shape", [1] * 10**5), r"norm.weight has shape \[1, .*\.\.\.\]"),
    "unknown dtype": (edit_entry("dtype", "F99"), "norm.weight is stored as F99; supported: F32, BF16, F16"),
    "dtype of many lines": (edit_entry("dtype", "\n" * 9999), "norm.weight is stored as '.*'; supported"),
    "number of many digits": (
        lambda f: replace_header(f, lambda text: text.replace("[0,", f"[{'9' * 5000},", 1)),
        "damaged or incomplete",
    ),
    "no shape": (edit_entry("shape", None), "norm.weight has no dtype, shape"),
    "dtype not a name": (edit_entry("dtype", ["F32"]), r"norm.weight is stored as \['F32'\]"),
    "bytes against shape": (edit_entry("dtype", "BF16"), "has 120 bytes; its shape in BF16 needs 60"),
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
        "OPTForCausalLM.*not supported; the nearest that is: ",
    ),
    "index without map": (not_a_map, "has no weight_map"),
    "index lacks a tensor": (a_tensor_less_in_the_index, "lists no tensor model.norm.weight"),
    "index names another file": (index_names_another_file, r"a.safetensors has no tensor model.embed_tokens"),
    "file of index missing": (lambda f: use_index(f, "gone.safetensors"), "gone.safetensors"),
    "index leads up": (lambda f: use_index(f, "../elsewhere.safetensors"), "outside the folder"),
    "index is absolute": (lambda f: use_index(f, "/etc/passwd"), "outside the folder"),
    "index names no file": (lambda f: use_index(f, 7), "is in 7: no file name"),  # type: ignore[arg-type]
    "index names a list": (lambda f: use_index(f, ["a"]), r"is in \['a'\]: no file name"),  # type: ignore[arg-type]
    "index names many lines": (lambda f: use_index(f, "a\nb" * 999), "is not a file name"),
    "index names nothing": (lambda f: use_index(f, ""), "'' is not a file name"),
    "index names a long name": (lambda f: use_index(f, "a" * 10**6), "is not a file name"),
    "index names a name too long to be": (
        lambda f: use_index(f, "a" * 999),
        "cannot read .*a: File name too long",
    ),
    "index names the folder": (lambda f: use_index(f, "."), "is not a regular file"),
    "index names a device": (
        lambda f: (use_index(f, "zero"), (f / "zero").symlink_to("/dev/zero")),
        "outside the folder",
    ),
    "link leads out": (link_out, "outside the folder"),
    "weights link out": (to_link(WEIGHTS, "../elsewhere"), "outside the folder"),
    "index links out": (index_is_a_link, "outside the folder"),
    "config links out": (to_link("config.json", "../elsewhere"), "outside the folder"),
    "engine.json links out": (to_link("engine.json", "/etc/hostname"), "outside the folder"),
    "folder links out": (folder_links_out, "outside the folder"),
    "links in a circle": (links_in_a_circle, "cannot read .*a: "),
    "weights a pipe": (pipe(WEIGHTS), "model.safetensors is not a regular file"),
    "index a pipe": (index_is_a_pipe, "index.json is not a regular file"),
    "config a pipe": (pipe("config.json"), "config.json is not a regular file"),
    "engine.json a pipe": (pipe("engine.json"), "engine.json is not a regular file"),
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
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2000
