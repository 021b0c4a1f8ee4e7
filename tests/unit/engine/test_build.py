"""Build, load, re-shard: bit for bit what direct loading gives; and all or nothing when something fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distllm.comm.local import LocalControl, run_ranks
from distllm.engine import build_engine, eos_token_ids, load_weights, open_source, read_spec, resolve_model
from distllm.engine import writer as writer_module
from distllm.engine.describe import describe
from distllm.errors import CheckpointError, LayoutError, UserError
from distllm.models.shards import shard_table
from distllm.parallel.layout import RankLayout

CPU = torch.device("cpu")


def build(
    folder: Path, out: Path, tp_size: int, pp_size: int, dtype: Any = "float32", ranks: int = 1
) -> None:
    def rank(control: LocalControl) -> None:
        build_engine(open_source(folder), out, tp_size, pp_size, dtype, control)

    run_ranks(ranks, rank)


def load(folder: Path, layout: RankLayout, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    source = open_source(folder)
    return load_weights(source, shard_table(source.spec, layout), dtype, CPU)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


LAYOUTS = [(1, 1), (2, 1), (1, 3), (2, 3), (6, 1), (3, 2)]
LOADABLE = [(1, 1), (2, 1), (1, 3), (2, 3), (6, 1)]


@pytest.fixture(scope="module")
def weights_of(llama: Path) -> dict[RankLayout, dict[str, torch.Tensor]]:
    """From the checkpoint itself, of every rank of every layout."""
    layouts = [RankLayout(tp, pp, rank=rank) for tp, pp in LOADABLE for rank in range(tp * pp)]
    return {layout: load(llama, layout) for layout in layouts}


@pytest.mark.parametrize("built", [(1, 1), (2, 3), (6, 1), (2, 1)])
def test_any_engine_loads_under_any_layout(
    llama: Path, tmp_path: Path, weights_of: dict[RankLayout, dict[str, torch.Tensor]], built: tuple[int, int]
) -> None:
    build(llama, tmp_path / "engine", *built)
    for layout, weights in weights_of.items():
        assert same(load(tmp_path / "engine", layout), weights), layout


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_number_of_builders_does_not_matter(llama: Path, tmp_path: Path, ranks: int) -> None:
    build(llama, tmp_path / "alone", 2, 3)
    build(llama, tmp_path / "shared", 2, 3, ranks=ranks)
    assert snapshot(tmp_path / "alone") == snapshot(tmp_path / "shared")


def test_builders_share_the_files(llama: Path, tmp_path: Path) -> None:
    """Three ranks of the layout each, by two builders: neither makes all of them."""

    def rank(control: LocalControl) -> int:
        totals = []
        build_engine(
            open_source(llama),
            tmp_path / "e",
            2,
            3,
            "float32",
            control,
            lambda _, total: totals.append(total),
        )
        return totals[-1]

    shares = run_ranks(2, rank)
    assert sum(shares) == describe(read_spec(llama), 2, 3).weight_bytes and max(shares) < 0.7 * sum(shares)


def test_eos_of_the_config_is_kept(copied: Path, tmp_path: Path) -> None:
    """config.json itself is not copied."""
    (copied / "generation_config.json").unlink()
    build(copied, tmp_path / "engine", 1, 1)
    assert eos_token_ids(tmp_path / "engine") == (2,)


def test_an_engine_of_an_engine_is_the_same_engine(llama: Path, tmp_path: Path) -> None:
    build(llama, tmp_path / "first", 6, 1, "bfloat16")
    build(tmp_path / "first", tmp_path / "second", 2, 2, "bfloat16")
    build(llama, tmp_path / "direct", 2, 2, "bfloat16")
    second, direct = snapshot(tmp_path / "second"), snapshot(tmp_path / "direct")
    for files in (second, direct):
        index = json.loads(files.pop("engine.json"))
        assert index.pop("source") in ("first", "llama")
    assert second == direct


def test_dtype_is_converted_once(llama: Path, tmp_path: Path) -> None:
    build(llama, tmp_path / "engine", 2, 1, "bfloat16")
    layout = RankLayout(2, 1, rank=1)
    assert same(load(tmp_path / "engine", layout, torch.bfloat16), load(llama, layout, torch.bfloat16))
    rounded = {name: tensor.bfloat16().float() for name, tensor in load(llama, layout).items()}
    assert same(load(tmp_path / "engine", layout), rounded)


def test_files_are_plain_safetensors(llama: Path, tmp_path: Path) -> None:
    """Another reader sees the rank's tensors; vocabulary padding is zero."""
    build(llama, tmp_path / "engine", 2, 2, "bfloat16")
    for rank in range(4):
        layout = RankLayout(2, 2, rank=rank)
        wanted = load(llama, layout, torch.bfloat16)
        assert same({n: load_file(tmp_path / f"engine/rank0{rank}.safetensors")[n] for n in wanted}, wanted)
    assert load(llama, RankLayout(2, 2, rank=1))["embed.weight"][-1].abs().max() == 0


def test_what_an_engine_says_of_itself(llama: Path, tmp_path: Path) -> None:
    build(llama, tmp_path / "engine", 2, 1)
    assert sorted(path.name for path in (tmp_path / "engine").iterdir()) == [
        "chat_template.jinja",
        "engine.json",
        "generation_config.json",
        "rank00.safetensors",
        "rank01.safetensors",
        "tokenizer.json",
    ]
    engine = resolve_model(tmp_path / "engine")
    assert read_spec(engine) == read_spec(llama)
    assert eos_token_ids(engine) == eos_token_ids(llama) == (2,)
    index = json.loads((engine / "engine.json").read_text())
    assert (index["format_version"], index["source"], index["dtype"]) == (3, "llama", "float32")
    stored = index["ranks"][1]["layers.0.attn.qkv.weight"]
    content = (engine / "rank01.safetensors").read_bytes()
    size = 4 * stored["shape"][0] * stored["shape"][1]
    tensor = load(llama, RankLayout(2, 1, rank=1))["layers.0.attn.qkv.weight"]
    assert content[stored["offset"] : stored["offset"] + size] == tensor.numpy().tobytes()


def test_progress_ends_at_the_total(llama: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = open_source(llama)
    build_engine(source, tmp_path / "e", 2, 1, "float32", LocalControl(), lambda *at: seen.append(at))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 0
    seen.clear()
    load_weights(
        source, shard_table(source.spec, RankLayout()), torch.float32, CPU, lambda *at: seen.append(at)
    )
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 0


def test_an_engine_is_replaced_and_nothing_stays_beside_it(llama: Path, tmp_path: Path) -> None:
    build(llama, tmp_path / "engine", 1, 3)
    build(llama, tmp_path / "engine", 2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
    assert not (tmp_path / "engine" / "rank02.safetensors").exists()


def test_an_engine_may_be_cut_anew_in_its_place(llama: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    build(llama, engine, 6, 1)
    build(engine, engine, 1, 2, ranks=2)
    layout = RankLayout(1, 2, rank=1)
    assert same(load(engine, layout), load(llama, layout))


def test_values_beyond_float16(copied: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, copied / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"final_norm.weight has values beyond float16's range"):
        build(copied, tmp_path / "engine", 1, 1, "float16")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_engine_whole(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, victim: int, code: int
) -> None:
    """One rank meets it within a file: every rank raises the same line, and nothing stays behind."""
    out = tmp_path / "engine"
    build(llama, out, 1, 1)
    before, real = snapshot(tmp_path), os.fsync
    errors: list[str] = []

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith(f"rank0{victim}.safetensors") and os.fstat(descriptor).st_size > 5000:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(writer_module.os, "fsync", fsync)

    def rank(control: LocalControl) -> None:
        with pytest.raises(UserError, match=os.strerror(code)) as caught:
            build_engine(open_source(llama), out, 1, 3, "float32", control)
        errors.append(str(caught.value))

    run_ranks(ranks, rank)
    assert len(errors) == ranks and len(set(errors)) == 1 and "\n" not in errors[0]
    assert snapshot(tmp_path) == before


def test_failure_at_the_last_moment_restores_the_old_engine(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "engine"
    build(llama, out, 1, 1)
    before, real = snapshot(tmp_path), os.rename

    def rename(src: Path, dst: Path) -> None:
        if ".partial-" in str(src):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        real(src, dst)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(UserError, match="Operation not permitted"):
        build(llama, out, 2, 1)
    assert snapshot(tmp_path) == before


def test_a_real_full_file_system(llama: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the kernel itself refuses the write."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            build(llama, tmp_path / "engine", 1, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (lambda out: out.touch(), "it is a file"),
        (lambda out: (out.mkdir(), (out / "notes.txt").touch()), "it holds notes.txt, which would be lost"),
        (lambda out: (out.mkdir(), (out / "tokenizer.json").touch()), "neither empty nor an engine"),
    ],
)
def test_nothing_else_is_overwritten(llama: Path, tmp_path: Path, prepare: Any, text: str) -> None:
    out = tmp_path / "out"
    prepare(out)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=text):
        build(llama, out, 1, 1, ranks=2)
    assert snapshot(tmp_path) == before


def test_a_model_folder_is_not_overwritten(copied: Path) -> None:
    before = snapshot(copied)
    with pytest.raises(UserError, match="would be lost"):
        build(copied, copied, 1, 1)
    assert snapshot(copied) == before


def test_an_empty_folder_is_filled(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    build(llama, tmp_path / "engine", 1, 1)
    assert read_spec(tmp_path / "engine").num_layers == 3


def test_parent_must_exist(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; make it first"):
        build(llama, tmp_path / "no" / "engine", 1, 1)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(8, 1), (1, 4), (0, 1)])
def test_layouts_that_do_not_fit(llama: Path, tmp_path: Path, tp_size: int, pp_size: int) -> None:
    with pytest.raises(LayoutError):
        build(llama, tmp_path / "engine", tp_size, pp_size)
    assert list(tmp_path.iterdir()) == []


def flip_a_bit(engine: Path) -> None:
    content = bytearray((engine / "rank01.safetensors").read_bytes())
    content[-7] ^= 4
    (engine / "rank01.safetensors").write_bytes(content)


def edit(key: str, value: object) -> Any:
    def change(engine: Path) -> None:
        data = json.loads((engine / "engine.json").read_text())
        data[key] = value
        (engine / "engine.json").write_text(json.dumps(data))

    return change


def change_a_tensor(key: str, value: object) -> Any:
    def change(engine: Path) -> None:
        data = json.loads((engine / "engine.json").read_text())
        data["ranks"][0]["final_norm.weight"][key] = value
        (engine / "engine.json").write_text(json.dumps(data))

    return change


DAMAGE = {
    "bit": (flip_a_bit, r"rank01.safetensors: head.weight does not match its checksum"),
    "truncated": (lambda e: os.truncate(e / "rank00.safetensors", 999), "999 bytes instead of"),
    "missing": (lambda e: (e / "rank01.safetensors").unlink(), r"rank01.safetensors: No such file"),
    "version": (edit("format_version", 1), "format_version 1, not 3; build the engine again"),
    "unknown key": (edit("surprise", 1), r"engine.json is damaged"),
    "layout": (edit("tp_size", 4), "engine.json is damaged"),
    "huge layout": (edit("pp_size", 10**9), "engine.json is damaged"),
    "dtype": (edit("dtype", "int8"), "engine.json is damaged"),
    "spec": (edit("spec", {}), "engine.json is damaged"),
    "ranks": (edit("ranks", []), "engine.json is damaged"),
    "tensors": (edit("ranks", [{}, {}]), "engine.json is damaged"),
    "offset": (change_a_tensor("offset", 2**40), "bytes instead of"),
    "other offset": (change_a_tensor("offset", 1000), "final_norm.weight does not match its checksum"),
    "odd offset": (change_a_tensor("offset", 1001), "not aligned"),
    "negative offset": (change_a_tensor("offset", -8), "engine.json is damaged"),
    "shape": (change_a_tensor("shape", [60]), "engine.json is damaged"),
    "no shape": (change_a_tensor("shape", None), "engine.json is damaged"),
    "folder for a file": (
        lambda e: ((e / "rank00.safetensors").unlink(), (e / "rank00.safetensors").mkdir()),
        "rank00.safetensors is not a regular file",
    ),
    "not JSON": (lambda e: os.truncate(e / "engine.json", 100), "engine.json is not valid JSON"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_engine_is_one_clear_line(llama: Path, tmp_path: Path, kind: str) -> None:
    damage, text = DAMAGE[kind]
    build(llama, tmp_path / "engine", 2, 1)
    damage(tmp_path / "engine")
    with pytest.raises(CheckpointError, match=text) as caught:
        load(tmp_path / "engine", RankLayout())
    assert "\n" not in str(caught.value)


def test_under_its_own_layout_a_rank_reads_its_own_file(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where several ranks hold the same KV head; only what all hold alike is read from rank 0's."""
    build(llama, tmp_path / "engine", 6, 1)
    num_read, real = {}, os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        num_read[name] = num_read.get(name, 0) + buffers[0].nbytes
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    weights = load(tmp_path / "engine", RankLayout(6, 1, rank=5))
    replicated = ("norm.weight", ".o.bias", ".down.bias")
    alike = sum(weight.nbytes for name, weight in weights.items() if name.endswith(replicated))
    total = sum(weight.nbytes for weight in weights.values())
    assert num_read == {"rank00.safetensors": alike, "rank05.safetensors": total - alike}


def test_only_what_is_read_is_verified(llama: Path, tmp_path: Path) -> None:
    build(llama, tmp_path / "engine", 2, 1)
    flip_a_bit(tmp_path / "engine")
    load(tmp_path / "engine", RankLayout(2, 1, rank=0))
    with pytest.raises(CheckpointError, match="checksum"):
        load(tmp_path / "engine", RankLayout(2, 1, rank=1))


def test_a_tensor_is_verified_once(llama: Path, tmp_path: Path) -> None:
    """A source is read many times in a build; the second time it reads no more than what it is asked for."""
    build(llama, tmp_path / "engine", 1, 1)
    source = open_source(tmp_path / "engine")
    shards = shard_table(source.spec, RankLayout(2, 1, rank=0))
    first = load_weights(source, shards, torch.float32, CPU)
    content = bytearray((tmp_path / "engine" / "rank00.safetensors").read_bytes())
    content[-7] ^= 4  # in the other rank's rows of the head
    (tmp_path / "engine" / "rank00.safetensors").write_bytes(content)
    assert same(load_weights(source, shards, torch.float32, CPU), first)
    with pytest.raises(CheckpointError, match="checksum"):
        load(tmp_path / "engine", RankLayout(2, 1, rank=0))


def test_a_build_from_a_damaged_engine_fails_on_every_rank(llama: Path, tmp_path: Path) -> None:
    build(llama, tmp_path / "engine", 2, 1)
    flip_a_bit(tmp_path / "engine")
    before = snapshot(tmp_path)

    def rank(control: LocalControl) -> None:
        with pytest.raises(CheckpointError, match="checksum"):
            build_engine(open_source(tmp_path / "engine"), tmp_path / "new", 1, 3, "float32", control)

    run_ranks(2, rank)
    assert snapshot(tmp_path) == before
    shutil.rmtree(tmp_path / "engine")
