"""Dummy weights: from config.json alone, and the same model under every layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distllm import LLM, CheckpointError, ConfigError, RequestError, SamplingParams
from distllm.comm.local import LocalControl, run_ranks
from distllm.engine import load_weights, open_source
from distllm.models.shards import shard_table
from distllm.parallel.layout import RankLayout

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def bare(llama: Path, tmp_path: Path) -> Path:
    """A folder with config.json alone."""
    shutil.copy(llama / "config.json", tmp_path)
    return tmp_path


def generate(folder: Path, tp: int, pp: int) -> Any:
    def run(control: LocalControl) -> Any:
        options = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "load_format": "dummy"}
        with LLM(str(folder), comm=control, **options) as llm:
            return llm.generate([[1, 2, 3], [4, 5]], GREEDY)

    return [list(output.outputs[0].token_ids) for output in run_ranks(tp * pp, run)[0]]


def test_every_layout_runs_the_same_model(bare: Path) -> None:
    alone = generate(bare, 1, 1)
    assert len(alone) == 2 and len(alone[0]) == 8
    assert generate(bare, 2, 1) == alone
    assert generate(bare, 6, 1) == alone
    assert generate(bare, 2, 2) == alone


def test_weights_are_normal_and_gains_are_one(bare: Path) -> None:
    source = open_source(bare, "dummy")
    weights = load_weights(source, shard_table(source.spec, RankLayout()), torch.float32, CPU)
    assert all((w == 1).all() for name, w in weights.items() if name.endswith("norm.weight"))
    qkv = weights["layers.0.attn.qkv.weight"]
    assert abs(qkv.mean()) < 0.003 and abs(qkv.std() - 0.02) < 0.003
    assert not torch.equal(qkv, weights["layers.1.attn.qkv.weight"])


def test_every_rank_holds_slices_of_the_same_model(bare: Path) -> None:
    """The last of six: padded vocabulary, replicated KV heads."""
    source = open_source(bare, "dummy")
    whole, part = (
        load_weights(source, shard_table(source.spec, layout), torch.bfloat16, CPU)
        for layout in (RankLayout(), RankLayout(6, 1, rank=5))
    )
    qkv, at = whole["layers.2.attn.qkv.weight"], (slice(30, 36), slice(42, 48), slice(54, 60))
    assert torch.equal(part["layers.2.attn.qkv.weight"], torch.cat([qkv[rows] for rows in at]))
    assert torch.equal(part["layers.2.mlp.down.weight"], whole["layers.2.mlp.down.weight"][:, 31:])
    assert torch.equal(part["embed.weight"][:6], whole["embed.weight"][35:])
    assert not part["embed.weight"][6:].any()


def test_a_folder_without_weights_needs_the_option(bare: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        LLM(str(bare))
    with pytest.raises(ConfigError, match="load_format is 'dumy'; it must be one of auto, dummy"):
        LLM(str(bare), load_format="dumy")


def test_without_a_tokenizer_prompts_are_token_ids(bare: Path) -> None:
    with (
        LLM(str(bare), load_format="dummy") as llm,
        pytest.raises(RequestError, match=r"no tokenizer\.json, .* give the prompt as token ids"),
    ):
        llm.generate("text")
