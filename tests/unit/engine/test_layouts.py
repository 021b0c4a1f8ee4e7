"""Every way in which a family stores a slot, read for every rank of tp 1, 2 and 4: against slices that are
taken here from the whole tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distllm.engine import WeightSource, load_weights, open_source
from distllm.errors import CheckpointError
from distllm.models import registry
from distllm.models.family import Family
from distllm.models.registry import parse_config
from distllm.models.spec import DecoderSpec
from distllm.parallel.sharding import (
    TensorShard,
    column_shards,
    replicated,
    row_shards,
    split_exact,
    split_kv_heads,
    split_range,
    vocab_shard,
)
from tests.unit.engine.layouts import CASES, HEAD_DIM, HEADS, HIDDEN, LAYERS, VOCAB, WIDTH, Case, Tensors

CPU = torch.device("cpu")


def spec_of(case: Case, slots: Tensors) -> DecoderSpec:
    """Its numbers; what else a family's read_config would say does not matter to where slots lie."""
    return parse_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": case.kv,
            "head_dim": HEAD_DIM,
            "intermediate_size": len(slots["layers.0.mlp.up.weight"]),
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 64,
        }
    )


def make(case: Case) -> tuple[str, Tensors]:
    """Random, and in the case's dtype."""
    torch.manual_seed(0)
    architecture, tensors = case.make(case.kv)
    return architecture, {name: torch.randn(t.shape).to(case.dtype) for name, t in tensors.items()}


def save(folder: Path, architecture: str, tensors: Tensors, num_files: int = 1) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    files = {f"model-{n}.safetensors": list(tensors)[n::num_files] for n in range(num_files)}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def open_case(
    case: Case, folder: Path, architecture: str, slots: Tensors, monkeypatch: pytest.MonkeyPatch
) -> WeightSource:
    """The folder, read by the case's table."""
    spec = replace(spec_of(case, slots), family="case")
    family = Family("case", (architecture,), lambda config: spec, case.slots)
    monkeypatch.setattr(registry, "FAMILIES", (family,))
    shapes = {slot: tuple(tensor.shape) for slot, tensor in slots.items()}
    monkeypatch.setattr("distllm.engine.checkpoint.slot_shapes", lambda spec: shapes)
    return open_source(folder)


def shards_of(case: Case, slots: Tensors, tp: int, rank: int) -> Iterator[TensorShard]:
    """All slots, in the shards of a layout: fused q, k, v, a row-cut output, padded vocabularies, norms."""
    q, kv = split_exact(HEADS, tp, rank, "heads"), split_kv_heads(case.kv, tp, rank)
    rows = (q[0] * HEAD_DIM, q[1] * HEAD_DIM), (kv[0] * HEAD_DIM, kv[1] * HEAD_DIM)
    width = split_range(len(slots["layers.0.mlp.up.weight"]), tp, rank)
    for n in range(LAYERS):
        at = f"layers.{n}."
        parts = [(f"{at}attn.q", rows[0]), (f"{at}attn.k", rows[1]), (f"{at}attn.v", rows[1])]
        yield from column_shards(f"{at}attn.qkv", parts, HIDDEN, f"{at}attn.q.bias" in slots)
        gate_up = [(f"{at}mlp.{part}", width) for part in ("gate", "up") if f"{at}mlp.{part}.weight" in slots]
        yield from column_shards(f"{at}mlp.gate_up", gate_up, HIDDEN, f"{at}mlp.up.bias" in slots)
        for name, span in (("attn.o", rows[0]), ("mlp.down", width)):
            yield from row_shards(at + name, span, HIDDEN, f"{at}{name}.bias" in slots)
    for slot, tensor in slots.items():
        if slot in ("embed.weight", "head.weight"):
            yield vocab_shard(slot, VOCAB, HIDDEN, tp, rank)
        elif "norm" in slot:
            yield replicated(slot, len(tensor))


def heads(whole: torch.Tensor, of: list[int]) -> torch.Tensor:
    return whole.view(-1, HEAD_DIM, *whole.shape[1:])[of].flatten(0, 1)


def wanted(case: Case, slots: Tensors, tp: int, rank: int) -> Tensors:
    """The rank's share of each slot, by names of shards."""
    q = [head for head in range(HEADS) if head * tp // HEADS == rank]
    kv = sorted({head * case.kv // HEADS for head in q})
    found = {
        slot: slots[slot] for slot in slots if "norm" in slot or slot.endswith((".o.bias", ".down.bias"))
    }
    for n in range(LAYERS):
        for kind in ("weight", "bias"):
            stems = [f"layers.{n}.attn.{part}.{kind}" for part in "qkv"]
            if stems[0] in slots:
                cut = [heads(slots[stem], own) for stem, own in zip(stems, (q, kv, kv), strict=True)]
                found[f"layers.{n}.attn.qkv.{kind}"] = torch.cat(cut)
            parts = [slots.get(f"layers.{n}.mlp.{part}.{kind}") for part in ("gate", "up")]
            cut = [part.tensor_split(tp)[rank] for part in parts if part is not None]
            if cut:
                found[f"layers.{n}.mlp.gate_up.{kind}"] = torch.cat(cut)
        out, down = slots[f"layers.{n}.attn.o.weight"], slots[f"layers.{n}.mlp.down.weight"]
        found[f"layers.{n}.attn.o.weight"] = out.chunk(tp, 1)[rank]
        found[f"layers.{n}.mlp.down.weight"] = down.tensor_split(tp, 1)[rank]
    for slot in {"embed.weight", "head.weight"} & set(slots):
        padded = torch.cat([slots[slot], torch.zeros(-VOCAB % tp, HIDDEN)])
        found[slot] = padded.chunk(tp)[rank]
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_slot_of_every_rank(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 64-byte reads and of one; KV heads fewer than ranks, and more."""
    case = CASES[name]
    architecture, tensors = make(case)
    save(tmp_path, architecture, tensors, num_files=3 if len(name) % 2 else 1)
    slots = case.slots_of(tensors)
    source = open_case(case, tmp_path, architecture, slots, monkeypatch)
    for tp in (1, 2, 4):
        for rank in range(tp):
            shards = list(shards_of(case, slots, tp, rank))
            monkeypatch.setattr("distllm.engine.reader.CHUNK_BYTES", 2**23 if rank % 2 else 640)
            got, expected = load_weights(source, shards, torch.float32, CPU), wanted(case, slots, tp, rank)
            assert got.keys() == expected.keys()
            for shard, values in expected.items():
                assert torch.equal(got[shard], values), f"{shard}, rank {rank} of {tp}"


@pytest.mark.parametrize("name", ["chatglm", "falcon 40b", "falcon rw"])
def test_of_a_fused_tensor_a_rank_reads_its_rows_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    architecture, tensors = make(case)
    save(tmp_path, architecture, tensors)
    slots = case.slots_of(tensors)
    source = open_case(case, tmp_path, architecture, slots, monkeypatch)
    shards = [shard for shard in shards_of(case, slots, 4, 2) if shard.name.endswith("qkv.weight")]
    num_read, real = 0, os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal num_read
        num_read += buffers[0].nbytes
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    weights = load_weights(source, shards, case.dtype, CPU)
    assert num_read == sum(weight.nbytes for weight in weights.values()) > 0


def test_names_without_their_prefix_and_tensors_of_no_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published GPT-2: no `transformer.`, buffers of masks; in some a head although it is tied."""
    case = CASES["gpt2"]
    architecture, tensors = make(case)
    slots = case.slots_of(tensors)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 23, 23, dtype=torch.uint8)
    bare["lm_head.weight"] = torch.full((3, 3), torch.nan)
    save(tmp_path, architecture, bare)
    source = open_case(case, tmp_path, architecture, slots, monkeypatch)
    got = load_weights(source, list(shards_of(case, slots, 2, 1)), torch.float32, CPU)
    assert all(torch.equal(got[name], values) for name, values in wanted(case, slots, 2, 1).items())


def test_learned_positions_are_whole_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["gpt2"]
    architecture, tensors = make(case)
    save(tmp_path, architecture, tensors)
    slots = case.slots_of(tensors)
    source = open_case(case, tmp_path, architecture, slots, monkeypatch)
    shard = replace(replicated("positions.weight", 23), shape=(23, HIDDEN))
    got = load_weights(source, [shard], torch.float32, CPU)["positions.weight"]
    assert torch.equal(got, tensors["transformer.wpe.weight"].float())


BAD = {
    "fused tensor too small": (
        "baichuan",
        "model.layers.1.self_attn.W_pack.weight",
        torch.zeros(3 * HEADS * HEAD_DIM - 1, HIDDEN),
        r"W_pack.weight has shape \[143, 48\]; config.json asks for \[144, 48\]",
    ),
    "Conv1D not transposed": (
        "gpt2",
        "transformer.h.1.mlp.c_fc.weight",
        torch.zeros(WIDTH, HIDDEN),
        r"c_fc.weight has shape \[37, 48\]; config.json asks for \[48, 37\]",
    ),
    "neither name": (
        "falcon 40b",
        "transformer.h.1.ln_attn.weight",
        None,
        "has no tensor transformer.h.1.ln_attn.weight or transformer.h.1.input_layernorm.weight",
    ),
    "fused tensor missing": (
        "chatglm",
        "transformer.encoder.layers.0.self_attention.query_key_value.bias",
        None,
        "has no tensor transformer.encoder.layers.0.self_attention.query_key_value.bias",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_layout_that_does_not_fit_is_one_clear_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, tensor, values, text = BAD[kind]
    case = CASES[name]
    architecture, tensors = make(case)
    slots = case.slots_of(tensors)
    tensors = (
        tensors | {tensor: values} if values is not None else {n: tensors[n] for n in tensors if n != tensor}
    )
    save(tmp_path, architecture, tensors)
    with pytest.raises(CheckpointError, match=text) as caught:
        open_case(case, tmp_path, architecture, slots, monkeypatch)
    assert "\n" not in str(caught.value)


def test_experts_have_a_number_of_their_own() -> None:
    name = "model.layers.{n}.block_sparse_moe.experts.{e}"
    slots = {f"layers.{{n}}.moe.experts.{{e}}.{part}": f"{name}.w{w}" for part, w in (("gate", 1), ("up", 3))}
    family = Family("moe", (), parse_config, slots)
    spec = spec_of(CASES["qwen"], {"layers.0.mlp.up.weight": torch.empty(WIDTH, HIDDEN)})
    source = family.source(spec, "layers.11.moe.experts.7.up.weight", (WIDTH, HIDDEN))
    assert source.names == ("model.layers.11.block_sparse_moe.experts.7.w3.weight",)
    assert source.shape == (WIDTH, HIDDEN) and source.spans == ((0, WIDTH),)
