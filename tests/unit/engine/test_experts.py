"""Experts as stacks: against slices of the checkpoint's own tensors, through engines of other layouts, and
made up. Nothing divides: seven inner features on two and three ranks.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distllm.comm.local import LocalControl, run_ranks
from distllm.engine import build_engine, load_weights, open_source, reader
from distllm.models.shards import shard_table
from distllm.parallel.layout import RankLayout
from tests.checkpoints import make_model

EXPERTS, INNER = 5, 7
GRIDS = [(1, 1), (2, 1), (3, 2), (6, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 24}
    make_model(
        path,
        "mixtral",
        num_local_experts=EXPERTS,
        intermediate_size=INNER,
        num_hidden_layers=2,
        vocab_size=11,
        **heads,
    )
    return path


def load(path: Path, layout: RankLayout, load_format: str = "auto") -> dict[str, torch.Tensor]:
    source = open_source(path, load_format)
    return load_weights(source, shard_table(source.spec, layout), torch.float32, torch.device("cpu"))


def all_ranks(tp: int, pp: int) -> list[RankLayout]:
    return [RankLayout(tp, pp, rank=rank) for rank in range(tp * pp)]


@pytest.mark.parametrize(("tp", "pp"), GRIDS)
def test_stacks_are_slices_of_every_expert(folder: Path, tp: int, pp: int) -> None:
    stored = load_file(folder / "model.safetensors")
    for layout in all_ranks(tp, pp):
        weights = load(folder, layout)
        for n in range(2)[layout.pp_rank * 2 // pp : (layout.pp_rank + 1) * 2 // pp]:
            at = f"model.layers.{n}.block_sparse_moe"
            w1, w2, w3 = (
                [stored[f"{at}.experts.{e}.w{i}.weight"] for e in range(EXPERTS)] for i in (1, 2, 3)
            )
            gate, up = ([w.tensor_split(tp)[layout.tp_rank] for w in matrices] for matrices in (w1, w3))
            gate_up = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
            down = torch.stack([w.tensor_split(tp, 1)[layout.tp_rank] for w in w2])
            assert torch.equal(weights[f"layers.{n}.moe.gate_up.weight"], gate_up)
            assert torch.equal(weights[f"layers.{n}.moe.down.weight"], down)
            assert torch.equal(weights[f"layers.{n}.moe.router.weight"], stored[f"{at}.gate.weight"])


@pytest.mark.parametrize("chunk_bytes", [100, 2**20])
def test_engines_are_cut_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    def build(control: LocalControl) -> None:
        build_engine(open_source(folder), tmp_path / "engine", 3, 2, "float32", control)

    run_ranks(2, build)
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk_bytes)
    for layout in [layout for grid in GRIDS for layout in all_ranks(*grid)]:
        direct, through = load(folder, layout), load(tmp_path / "engine", layout)
        assert direct.keys() == through.keys()
        assert all(torch.equal(direct[name], through[name]) for name in direct), layout


def test_made_up_experts_are_of_one_model(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    whole, last = (load(tmp_path, layout, "dummy") for layout in (RankLayout(), RankLayout(3, rank=2)))
    gate_up, down = (whole[f"layers.1.moe.{name}.weight"] for name in ("gate_up", "down"))
    rows = [5, 6, INNER + 5, INNER + 6]
    assert torch.equal(last["layers.1.moe.gate_up.weight"], gate_up[:, rows])
    assert torch.equal(last["layers.1.moe.down.weight"], down[:, :, 5:])
    assert len({float(matrix.sum()) for matrix in down}) == EXPERTS  # each with values of its own
