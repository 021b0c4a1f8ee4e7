"""A checkpoint over any layout, ranks as threads, in random steps through a cache with shuffled blocks."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from distllm.comm.local import LocalControl, run_ranks
from distllm.engine import load_weights, open_source
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
    folder: Path, grid: RankLayout, texts: list[list[int]], seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Logits of every token of every text, [len(text), vocab_size] each, from the last stage's last rank."""
    rng = random.Random(seed)
    lengths = [len(text) for text in texts]
    steps, tables = random_steps(lengths, rng), shuffled_tables(lengths, rng)

    @torch.inference_mode()
    def rank(control: LocalControl) -> list[torch.Tensor]:
        return _run_rank(control, folder, grid.at(control.rank), texts, steps, tables, dtype)

    return run_ranks(grid.world_size, rank)[-1]


def _run_rank(
    control: LocalControl,
    folder: Path,
    layout: RankLayout,
    texts: list[list[int]],
    steps: list[Step],
    tables: torch.Tensor,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    tp = control.split(layout.pp_rank, layout.tp_rank)
    pipe = control.split(layout.tp_rank, layout.pp_rank)
    source = open_source(folder)
    spec = source.spec
    weights = load_weights(source, shard_table(spec, layout), dtype, torch.device("cpu"))
    decoder = Decoder(spec, layout, weights, tp)
    kv_cache = torch.zeros(decoder.kv_cache_shape(tables.numel(), BLOCK_SIZE), dtype=dtype)
    out = [torch.zeros(len(text), spec.vocab_size) for text in texts]
    for step in steps:
        batch = make_batch(step, tables)
        if layout.is_first_stage:
            ids = [token for row, start, stop in step.rows for token in texts[row][start:stop]]
            hidden = decoder.embed(torch.tensor(ids))
        else:
            hidden = pipe.recv(kv_cache.new_empty(len(batch.positions), spec.hidden_size), layout.pp_rank - 1)
        hidden = decoder.forward(hidden, batch, kv_cache)
        if not layout.is_last_stage:
            pipe.send(hidden, layout.pp_rank + 1)
            continue
        parts = decoder.logits(hidden).split([stop - start for _, start, stop in step.rows])
        for (row, start, stop), logits in zip(step.rows, parts, strict=True):
            out[row][start:stop] = logits
    return out
