"""The shard table: over all ranks every slot is covered, once but for what is replicated on purpose."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from distllm.errors import LayoutError
from distllm.models.moe_spec import MoESpec
from distllm.models.rope_spec import RopeSpec
from distllm.models.shards import check_layout, shard_table, slot_shapes, stage_layers
from distllm.models.spec import DecoderSpec, NormSpec
from distllm.parallel.layout import RankLayout


def spec(**changes: object) -> DecoderSpec:
    values: dict[str, object] = {
        "family": "llama",
        "vocab_size": 103,
        "hidden_size": 24,
        "num_layers": 5,
        "num_heads": 12,
        "num_kv_heads": 3,
        "head_dim": 4,
        "intermediate_size": 31,
        "activation": "silu",
        "norm": NormSpec("rms", 1e-5),
        "rope": RopeSpec(1e4),
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "tied_embeddings": False,
        "max_position_embeddings": 64,
        "dtype": "float32",
    }
    return DecoderSpec(**values | changes)  # type: ignore[arg-type]


MOE = MoESpec(3, 2, 7, renormalize=True, dense_layers=(1, 4))
GRIDS = [(1, 1), (3, 1), (1, 5), (3, 2), (6, 2), (12, 3)]


@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": True}, {"moe": MOE, "mlp_bias": False}], ids=str)
@pytest.mark.parametrize(("tp_size", "pp_size"), GRIDS)
def test_every_element_is_owned(tp_size: int, pp_size: int, changes: dict[str, object]) -> None:
    """Count the owners of each row or column of each slot over all ranks."""
    model, layout = spec(**changes), RankLayout(tp_size, pp_size)
    tied = model.tied_embeddings
    owners: dict[str, Counter[int]] = {slot: Counter() for slot in slot_shapes(model)}
    dims: dict[str, int] = {}
    for rank in range(layout.world_size):
        for shard in shard_table(model, layout.at(rank)):
            for piece in shard.pieces:
                owners[piece.slot].update(range(piece.start, piece.stop))
                assert dims.setdefault(piece.slot, piece.dim) == piece.dim
    for slot, count in owners.items():
        assert sorted(count) == list(range(slot_shapes(model)[slot][dims[slot]])), slot
        assert set(count.values()) == {owner_count(slot, tp_size, pp_size, tied)}, slot


def owner_count(slot: str, tp_size: int, pp_size: int, tied: bool) -> int:
    if "norm" in slot or "router" in slot or slot.endswith((".o.bias", ".down.bias")):
        return tp_size
    if ".attn.k." in slot or ".attn.v." in slot:
        return max(1, tp_size // 3)
    return 2 if slot == "embed.weight" and tied and pp_size > 1 else 1


@pytest.mark.parametrize(("tp_size", "pp_size"), GRIDS)
def test_pieces_fill_their_shard_without_overlap(tp_size: int, pp_size: int) -> None:
    """Only a vocabulary shard may have padding, and only at its end."""
    for rank in range(tp_size * pp_size):
        for shard in shard_table(spec(), RankLayout(tp_size, pp_size, rank=rank)):
            at = 0
            for piece in shard.pieces:
                assert piece.dst_start == at
                at += piece.stop - piece.start
            if shard.name in ("embed.weight", "head.weight"):
                assert at <= shard.shape[0]
            else:
                assert at == shard.shape[piece.dim]


@pytest.mark.parametrize("tp_size", [1, 3, 12])
def test_pieces_fill_stacks_without_overlap(tp_size: int) -> None:
    """Each value of each matrix is written once; seven features on twelve ranks leave some without any."""
    for rank in range(tp_size):
        shards = shard_table(spec(moe=MOE, mlp_bias=False), RankLayout(tp_size, rank=rank))
        stacks = [shard for shard in shards if len(shard.shape) == 3]
        assert [shard.name for shard in stacks] == [
            f"layers.{n}.moe.{part}.weight" for n in (0, 2, 3) for part in ("gate_up", "down")
        ]
        for shard in stacks:
            written = np.zeros(shard.flat_shape, int)
            for piece in shard.pieces:
                row, column = piece.origin(2)
                rows, columns = piece.shape(shard.matrix_shape)
                written[row : row + rows, column : column + columns] += 1
            assert (written == 1).all()


def test_names_are_unique_and_stages_hold_their_own_layers() -> None:
    for rank in range(4):
        layout = RankLayout(1, 4, rank=rank)
        names = [shard.name for shard in shard_table(spec(), layout)]
        assert len(names) == len(set(names))
        assert {int(name.split(".")[1]) for name in names if name.startswith("layers.")} == set(
            stage_layers(spec(), layout)
        )
        assert ("embed.weight" in names) == (rank == 0)
        assert ("head.weight" in names) == ("final_norm.weight" in names) == (rank == 3)


def test_tied_model_on_one_stage_holds_its_vocabulary_once() -> None:
    names = [shard.name for shard in shard_table(spec(tied_embeddings=True), RankLayout())]
    assert names.count("embed.weight") == 1 and "head.weight" not in names
    last = [shard.name for shard in shard_table(spec(tied_embeddings=True), RankLayout(1, 2, rank=1))]
    assert last[-2:] == ["final_norm.weight", "embed.weight"]


def test_cut_ranks_hold_their_share() -> None:
    whole = sum(math.prod(shard.shape) for shard in shard_table(spec(), RankLayout()))
    parts = [sum(math.prod(s.shape) for s in shard_table(spec(), RankLayout(3, 1, rank=r))) for r in range(3)]
    assert max(parts) < 0.4 * whole


@pytest.mark.parametrize(
    ("tp_size", "pp_size", "text"),
    [
        (2, 1, r"tp 2 does not fit 12 attention heads and 3 KV heads; tp can be 1, 3, 6, 9, 12"),
        (5, 1, "tp 5 does not fit"),
        (24, 1, "tp 24 does not fit"),
        (1, 6, "pp 6 is more than the model's 5 layers; use -pp 5 or less"),
    ],
)
def test_refused_layouts(tp_size: int, pp_size: int, text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        check_layout(spec(), RankLayout(tp_size, pp_size))
