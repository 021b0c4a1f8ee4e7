"""Every knob of DecoderSpec, alone and with others at random, over layouts, against a decoder on paper."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distllm.comm.local import LocalComm
from distllm.engine.source import Block, region_at
from distllm.errors import CheckpointError
from distllm.kernels import add_rms_norm
from distllm.models.moe_spec import MoESpec
from distllm.models.rope_spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    RopeSpec,
    YarnScaling,
)
from distllm.models.shards import slot_shapes
from distllm.models.spec import DecoderSpec, NormSpec
from distllm.parallel.layout import RankLayout
from distllm.parallel.sharding import TensorShard, valid_tp_sizes
from tests.specs import llama_spec
from tests.unit.models.plain_decoder import PlainDecoder
from tests.unit.models.stepping import run_layout

BASE = llama_spec(
    vocab_size=23,
    hidden_size=20,
    num_heads=6,
    head_dim=8,
    intermediate_size=27,
    rope=RopeSpec(1e3),
    max_position_embeddings=64,
)
KNOBS: dict[str, list[dict[str, Any]]] = {
    "norm": [
        {"norm": NormSpec("rms", 1e-3, plus_one=True)},
        {"norm": NormSpec("layer", 1e-3)},
    ],
    "rope": [
        {"rope": None},
        {"rope": RopeSpec(1e3, interleaved=True)},
        {"rope": RopeSpec(1e3, rotary_dim=4)},
        {"rope": RopeSpec(1e3, rotary_dim=6, interleaved=True)},
    ],
    "windows": [
        {"windows": (5, 0)},
        {"windows": (0, 5), "window_rope": RopeSpec(50.0)},
        {"windows": (100, 1), "window_rope": RopeSpec(50.0)},
    ],
    "activation": [{"activation": name} for name in ("gelu", "gelu_tanh", "relu")],
    "gated": [{"gated": False}],
    "moe": [
        {"moe": MoESpec(5, 2, 13, renormalize=True)},
        {"moe": MoESpec(3, 3, 1, renormalize=False)},
        {"moe": MoESpec(4, 1, 9, renormalize=False, dense_layers=(1,))},
    ],
    "biases": [{"qkv_bias": True, "out_bias": True, "mlp_bias": True}, {"qkv_bias": True}],
    "residual": [{"residual": "parallel"}, {"residual": "parallel_shared"}],
    "post_norms": [{"post_norms": True}],
    "embedding": [{"embedding_norm": True}, {"embedding_scale": 3.3}, {"learned_positions": 2}],
    "qk_norm": [{"qk_norm": True}],
    "attention": [{"attention_scale": 0.7}, {"attention_softcap": 0.6}],
    "alibi": [{"alibi_scale": 1.0, "rope": None}, {"alibi_scale": 0.35}],
    "head": [{"tied_embeddings": True}, {"normalized_head": True}],
    "logits": [{"logit_scale": 0.25}, {"logit_softcap": 1.5}, {"logit_scale": 2.0, "logit_softcap": 1.0}],
    "heads": [{"num_heads": 7, "num_kv_heads": 1}, {"num_heads": 10}, {"num_kv_heads": 6}],
}
ALONE = [choice for choices in KNOBS.values() for choice in choices]


class MemorySource:
    """Random slots in fp32, as a WeightSource."""

    path = Path("memory")

    def __init__(self, spec: DecoderSpec, seed: int) -> None:
        torch.manual_seed(seed)
        self.spec = spec
        self.slots = {
            name: torch.randn(shape) * 0.3 + (1.0 if "norm.weight" in name else 0.0)
            for name, shape in slot_shapes(spec).items()
        }

    def read(self, shards: Sequence[TensorShard], device: torch.device) -> Iterator[Block]:
        for shard in shards:
            for piece in shard.pieces:
                values = self.slots[piece.slot].narrow(piece.dim, piece.start, piece.stop - piece.start)
                yield Block(shard.name, region_at(piece.origin(values.dim()), values), values)


def error(spec: DecoderSpec, layout: RankLayout, seed: int) -> float:
    rng = random.Random(seed)
    texts = [[rng.randrange(spec.vocab_size) for _ in range(length)] for length in (1, 17, 6)]
    source = MemorySource(spec, seed)
    plain = PlainDecoder(spec, {name: slot.double() for name, slot in source.slots.items()})
    found = run_layout(source, layout, texts, seed)
    return max(float((a - plain.logits(t)).abs().max()) for a, t in zip(found, texts, strict=True))


@pytest.mark.parametrize("number", range(len(ALONE)), ids=lambda n: ",".join(ALONE[n]))
def test_alone(number: int) -> None:
    spec = replace(BASE, **ALONE[number])
    assert error(spec, RankLayout(), number) <= 1e-4
    assert error(spec, RankLayout(2, 2), number) <= 1e-4


@pytest.mark.parametrize("seed", range(16))
def test_together(seed: int) -> None:
    """Whatever the families to come combine: no knob may know of another."""
    rng = random.Random(seed)
    changes: dict[str, Any] = {}
    for choices in KNOBS.values():
        changes |= rng.choice([{}, *choices])
    if changes.get("normalized_head"):
        changes["tied_embeddings"] = False
    if changes.get("moe"):  # the only MLPs that experts are
        changes |= {"activation": "silu", "gated": True, "mlp_bias": False}
    spec = replace(BASE, **changes)
    tp_sizes = [tp for tp in valid_tp_sizes(spec.num_heads, spec.num_kv_heads) if tp <= 6]
    assert error(spec, RankLayout(rng.choice(tp_sizes), rng.choice([1, 2])), seed) <= 1e-4


@pytest.mark.parametrize("residual", ["sequential", "parallel", "parallel_shared"])
def test_norms_that_the_sum_over_ranks_brings_along(monkeypatch: pytest.MonkeyPatch, residual: Any) -> None:
    """On GPUs one kernel sums and norms: each reader must get its own norm of it, plain or with 1 + w."""

    def fused(
        self: LocalComm, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(eps)
        return add_rms_norm(self.all_reduce(x), residual, weight, eps)

    calls: list[float] = []
    monkeypatch.setattr(LocalComm, "try_all_reduce_add_norm", fused, raising=False)
    for changes in KNOBS["norm"][0], {}:
        assert error(replace(BASE, residual=residual, **changes), RankLayout(2), 5) <= 1e-4
    assert calls


@pytest.mark.parametrize(
    "rope",
    [
        None,
        RopeSpec(1e4, LinearScaling(2.0)),
        RopeSpec(1e4, Llama3Scaling(8.0, 1.0, 4.0, 32), rotary_dim=4),
        RopeSpec(1e4, YarnScaling(4.0, 32, 1.1, truncate=False), interleaved=True),
        RopeSpec(1e4, DynamicScaling(2.0, 32)),
        RopeSpec(1e4, LongScaling((1.0,) * 4, (2.0,) * 4, 32, 1.2)),
    ],
    ids=lambda rope: rope and rope.scaling.kind,
)
def test_nested_specs_survive_json(rope: RopeSpec | None) -> None:
    spec = replace(
        BASE,
        rope=rope,
        windows=(3, 0),
        window_rope=RopeSpec(50.0),
        learned_positions=2,
        moe=MoESpec(4, 2, 7, renormalize=True, dense_layers=(0,)),
    )
    assert DecoderSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"windows": (3,)}, "1 windows for 2 layers"),
        ({"windows": (3, -1)}, "sliding_window is -1"),
        ({"residual": "sideways"}, "residual is 'sideways'; supported: 'sequential'"),
        ({"rope": RopeSpec(1e4, rotary_dim=10)}, "rotary_dim is 10; it must be an integer from 2 to 8"),
        ({"rope": RopeSpec(1e4, rotary_dim=3)}, "rotary_dim is 3"),
        ({"normalized_head": True, "tied_embeddings": True}, "cannot be tied"),
        ({"alibi_scale": -1.0}, "alibi_scale is -1.0"),
        ({"logit_softcap": float("nan")}, "logit_softcap is nan"),
        ({"gated": 1}, "gated is 1"),
    ],
)
def test_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        replace(BASE, **changes)


EXPERTS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "intermediate_size": 7, "renormalize": True}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_experts": 0}, "num_experts is 0; it must be an integer from 1 to 4096"),
        ({"num_experts": 10**9}, "num_experts is 1000000000"),
        ({"top_k": 5}, "num_experts_per_tok is 5; it must be an integer from 1 to 4"),
        ({"top_k": True}, "num_experts_per_tok is True"),
        ({"intermediate_size": 0}, "the experts' intermediate_size is 0"),
        ({"renormalize": 1}, "norm_topk_prob is 1"),
        ({"dense_layers": (-1,)}, "a dense layer is -1"),
    ],
)
def test_refused_experts(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        MoESpec(**EXPERTS | changes)


@pytest.mark.parametrize("change", [{"activation": "gelu"}, {"gated": False}, {"mlp_bias": True}])
def test_experts_are_gated_by_silu_without_biases(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=f"the experts' {next(iter(change))} is"):
        replace(BASE, moe=MoESpec(**EXPERTS), **change)
