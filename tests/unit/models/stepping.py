"""A checkpoint over any layout, ranks as threads, in random steps through a cache with shuffled blocks."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from distllm.comm.base import Channels
from distllm.comm.connect import open_channels
from distllm.comm.local import LocalControl, run_ranks
from distllm.engine import load_weights, open_source
from distllm.engine.source import WeightSource
from distllm.kernels.batch import TokenBatch
from distllm.models.decoder import Decoder
from distllm.models.shards import shard_table
from distllm.parallel.layout import RankLayout

BLOCK_SIZE = 4


@dataclass(frozen=True)
class Step:
    """Some rows, and for each the token positions [start, stop) that run."""

    rows: list[tuple[int, int, int]]


def random_steps(lengths: list[int], rng: random.Random) -> list[Step]:
    """Whole prompts, chunks and single tokens, mixed; each row forward from 0 to its length."""
    at = [0] * len(lengths)
    steps = []
    while at != lengths:
        rows = []
        for row in rng.sample(range(len(lengths)), rng.randint(1, len(lengths))):
            stop = min(lengths[row], at[row] + rng.choice([1, 1, 1, 3, 7, 50]))
            if at[row] < stop:
                rows.append((row, at[row], stop))
                at[row] = stop
        # Single tokens first, as plans have them; the kernels must not need it, so sometimes not.
        steps += (
            [Step(sorted(rows, key=lambda r: r[2] - r[1] > 1) if rng.random() < 0.7 else rows)]
            if rows
            else []
        )
    return steps


def shuffled_tables(lengths: list[int], rng: random.Random) -> torch.Tensor:
    """[num_rows, max_blocks] int32: no block twice."""
    width = -(-max(lengths) // BLOCK_SIZE)
    blocks = list(range(width * len(lengths)))
    rng.shuffle(blocks)
    return torch.tensor(blocks, dtype=torch.int32).view(len(lengths), width)


def make_batch(step: Step, tables: torch.Tensor) -> TokenBatch:
    positions = torch.cat([torch.arange(start, stop) for _, start, stop in step.rows])
    counts = torch.tensor([stop - start for _, start, stop in step.rows])
    longer = (counts > 1).nonzero()
    rows = torch.tensor([row for row, _, _ in step.rows])
    blocks = tables[rows.repeat_interleave(counts), positions // BLOCK_SIZE].long()
    return TokenBatch(
        positions=positions,
        slot_mapping=blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
        cu_seqlens_q=torch.cat((torch.zeros(1), counts.cumsum(0))).int(),
        seq_lens=torch.tensor([stop for _, _, stop in step.rows], dtype=torch.int32),
        block_table=tables[rows],
        num_decodes=int(longer[0]) if len(longer) else len(counts),
    )


def run_layout(
    model: Path | WeightSource,
    grid: RankLayout,
    texts: list[list[int]],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Logits of every token of every text, [len(text), vocab_size] each, from the last stage's last rank."""
    cpu = torch.device("cpu")

    def rank(control: LocalControl) -> list[torch.Tensor]:
        layout = grid.at(control.rank)
        return run_rank(open_channels(control, layout, cpu), model, layout, texts, seed, dtype, cpu)

    return run_ranks(grid.world_size, rank)[-1]


@torch.inference_mode()
def run_rank(
    channels: Channels,
    model: Path | WeightSource,
    layout: RankLayout,
    texts: list[list[int]],
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[torch.Tensor]:
    """What run_layout returns, fp32 on the host; zeros on the earlier stages. Collective."""
    rng, lengths = random.Random(seed), [len(text) for text in texts]
    steps, tables = random_steps(lengths, rng), shuffled_tables(lengths, rng)
    source = open_source(model) if isinstance(model, Path) else model
    spec = source.spec
    weights = load_weights(source, shard_table(spec, layout), dtype, device)
    decoder = Decoder(spec, layout, weights, channels.tp, max(lengths))
    kv_cache = torch.zeros(decoder.kv_cache_shape(tables.numel(), BLOCK_SIZE), dtype=dtype, device=device)
    out = [torch.zeros(len(text), spec.vocab_size) for text in texts]
    for step in steps:
        batch = _on_device(make_batch(step, tables), device)
        if layout.is_first_stage:
            ids = [token for row, start, stop in step.rows for token in texts[row][start:stop]]
            hidden = decoder.embed(torch.tensor(ids, device=device), batch.positions)
        else:
            hidden = kv_cache.new_empty(len(batch.positions), spec.hidden_size)
            channels.pipe.recv(hidden, layout.pp_rank - 1)
        hidden = decoder.forward(hidden, batch, kv_cache)
        if not layout.is_last_stage:
            channels.pipe.send(hidden, layout.pp_rank + 1)
            continue
        parts = decoder.logits(hidden).split([stop - start for _, start, stop in step.rows])
        for (row, start, stop), logits in zip(step.rows, parts, strict=True):
            out[row][start:stop] = logits
    return out


def _on_device(batch: TokenBatch, device: torch.device) -> TokenBatch:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: x.to(device) for name, x in values.items() if isinstance(x, torch.Tensor)})
