"""Loading to a GPU: pinned buffers, copies that overlap the reads, conversion there. Against the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distllm.engine import load_weights, open_source, reader
from distllm.errors import CheckpointError
from distllm.models.shards import shard_table
from distllm.parallel.layout import RankLayout
from tests.checkpoints import make_llama

pytestmark = pytest.mark.gpu

GPU = "cuda:0"
BUSY_CYCLES = 10**9  # about half a second


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 14 MB in float32."""
    path = tmp_path_factory.mktemp("llama")
    make_llama(path, hidden_size=256, intermediate_size=1021, vocab_size=1031)
    return path


def load(folder: Path, layout: RankLayout, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    source = open_source(folder)
    return load_weights(source, shard_table(source.spec, layout), dtype, torch.device(device))


@pytest.mark.parametrize("layout", [RankLayout(), RankLayout(2, 1, rank=1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("busy", [False, True])
def test_as_on_the_cpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, layout: RankLayout, dtype: torch.dtype, busy: bool
) -> None:
    """Hundreds of chunks; a busy device copies late: a buffer that is filled too early would show."""
    monkeypatch.setattr(reader, "CHUNK_BYTES", 2**15)
    if busy:
        torch.cuda._sleep(BUSY_CYCLES)
    got, wanted = load(folder, layout, dtype, GPU), load(folder, layout, dtype, "cpu")
    assert all(tensor.is_cuda for tensor in got.values())
    assert all(torch.equal(got[name].cpu(), tensor) for name, tensor in wanted.items())


def test_memory_beside_the_weights_is_a_few_chunks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", 2**18)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    weights = load(folder, RankLayout(), torch.float16, GPU)
    kept = torch.cuda.memory_allocated() - before
    assert kept >= sum(tensor.nbytes for tensor in weights.values())
    assert torch.cuda.max_memory_allocated() - before - kept < 4 * reader.CHUNK_BYTES


def test_values_beyond_float16(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][7, 5] = 1e6
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"layers.3.mlp.down.weight has values beyond float16's range"):
        load(tmp_path, RankLayout(), torch.float16, GPU)
