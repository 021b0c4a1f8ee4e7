"""`distllm plan`'s arithmetic against tensors that were really loaded, and against hand-computed sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distllm.comm.local import LocalControl
from distllm.engine import load_weights, open_source, read_spec
from distllm.engine.describe import describe
from distllm.errors import LayoutError
from distllm.models.decoder import Decoder
from distllm.models.registry import parse_config
from distllm.models.shards import shard_table
from distllm.parallel.layout import RankLayout

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def test_llama_3_1_8b() -> None:
    """Published: 8.03 billion parameters; 128 KiB of KV a token in bf16."""
    model = describe(parse_config(LLAMA_3_1_8B), 1, 1)
    assert model.num_parameters == 8_030_261_248
    assert model.ranks[0].weight_bytes == 2 * model.num_parameters
    assert model.ranks[0].kv_bytes_per_token == 131072
    cut = describe(parse_config(LLAMA_3_1_8B), 4, 2)
    assert [rank.layers for rank in cut.ranks] == [(0, 16)] * 4 + [(16, 32)] * 4
    assert {rank.kv_bytes_per_token for rank in cut.ranks} == {16384}
    qkv = next(line for line in cut.ranks[5].shards if line.name == "layers.*.attn.qkv.weight")
    assert (qkv.count, qkv.shape, qkv.num_bytes) == (16, (1536, 4096), 16 * 1536 * 4096 * 2)


@pytest.mark.parametrize(
    ("shape", "parameters"), [("mixtral-8x7b", 46_702_792_704), ("qwen3-30b-a3b", 30_532_122_624)]
)
def test_mixtures(shape: str, parameters: int) -> None:
    """Published numbers; every rank holds the same part of each expert."""
    spec = read_spec(Path(__file__).parents[3] / "benchmarks/shapes" / shape)
    assert describe(spec, 1, 1).num_parameters == parameters
    cut = describe(spec, 4, 1)
    assert len({rank.weight_bytes for rank in cut.ranks}) == 1
    assert cut.weight_bytes == pytest.approx(2 * parameters, rel=0.01)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (2, 3), (6, 2)])
def test_bytes_are_those_of_the_loaded_tensors(llama: Path, tp_size: int, pp_size: int) -> None:
    source = open_source(llama)
    model = describe(source.spec, tp_size, pp_size, "bfloat16")
    for rank in model.ranks:
        layout = RankLayout(tp_size, pp_size, rank=rank.rank)
        weights = load_weights(source, shard_table(source.spec, layout), torch.bfloat16, torch.device("cpu"))
        assert rank.weight_bytes == sum(tensor.nbytes for tensor in weights.values())
        assert sum(line.count for line in rank.shards) == len(weights)
        if tp_size == 1:
            tp = LocalControl().split(0, 0)
            shape = Decoder(source.spec, layout, weights, tp, 8).kv_cache_shape(num_blocks=1, block_size=1)
            assert rank.kv_bytes_per_token == 2 * torch.Size(shape).numel()


def test_kv_heads_are_replicated_beyond_their_number() -> None:
    model = describe(parse_config(LLAMA_3_1_8B), 16, 1)
    assert {(rank.num_heads, rank.num_kv_heads) for rank in model.ranks} == {(2, 1)}


def test_refused_layout() -> None:
    with pytest.raises(LayoutError, match="tp can be 1, 2, 4, 8, 16, 24, 32"):
        describe(parse_config(LLAMA_3_1_8B), 3, 1)
