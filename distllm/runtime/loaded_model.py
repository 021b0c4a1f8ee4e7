"""LoadedModel: a model's share on one rank, and the runner that it becomes when its KV blocks are counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from distllm.comm.base import Channels
from distllm.config import EngineConfig
from distllm.engine import WeightSource, load_weights
from distllm.models.decoder import Decoder
from distllm.models.shards import shard_table
from distllm.parallel.layout import RankLayout
from distllm.runtime.kv_memory import allocate_kv_cache
from distllm.runtime.model_runner import ModelRunner
from distllm.runtime.sampling.logits_processors import NamedProcessor
from distllm.runtime.slots import SlotTables

if TYPE_CHECKING:
    from distllm.engine.load import Progress


@dataclass(frozen=True)
class LoadedModel:
    decoder: Decoder
    layout: RankLayout  # of this model: a draft's may be smaller than the job's
    channels: Channels
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def load(
        source: WeightSource,
        layout: RankLayout,
        channels: Channels,
        context_len: int,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
    ) -> LoadedModel:
        """Read this rank's shard. Not collective."""
        shards = shard_table(source.spec, layout)
        weights = load_weights(source, shards, dtype, device, progress)
        decoder = Decoder(source.spec, layout, weights, channels.tp, context_len)
        return LoadedModel(decoder, layout, channels, dtype, device)

    def block_bytes(self, block_size: int) -> int:
        """Of one KV block on this rank, all layers of its stage."""
        return math.prod(self.decoder.kv_cache_shape(1, block_size)) * self.dtype.itemsize

    def start(
        self, config: EngineConfig, num_blocks: int, processors: Sequence[NamedProcessor]
    ) -> ModelRunner:
        """Allocate what it works with, and capture its steps on a GPU.

        Collective: every rank of this model.
        """
        kv_shape = self.decoder.kv_cache_shape(num_blocks + 1, config.block_size)  # one for padding rows
        kv_cache = allocate_kv_cache(kv_shape, self.dtype, self.device)
        tables = SlotTables(
            config.max_num_seqs,
            config.context_len,
            config.block_size,
            padding_block=num_blocks,
            device=self.device,
        )
        runner = ModelRunner(self.decoder, self.layout, self.channels, tables, kv_cache, processors)
        if self.device.type == "cuda" and not config.enforce_eager:
            runner.capture(config)
        return runner
