"""ModelRunner: one rank's share of a step. StepPlan in, StepResult out (on rank 0).

Owns the slot tables and the KV cache. Every collective that it enters, and every shape, follows from the
plans it was given, in their order. Knows no request; called by the worker and the coordinator loops.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from distllm.comm.base import Channels
from distllm.kernels import gather_batch
from distllm.kernels.batch import TokenBatch
from distllm.models.decoder import Decoder
from distllm.parallel.layout import RankLayout
from distllm.runtime.plan import StepPlan, StepResult, TokenLogprobs
from distllm.runtime.sampler import Sampled, num_top_logprobs, sample
from distllm.runtime.slots import SlotTables
from distllm.runtime.staging import to_device


@dataclass(frozen=True)
class _SampledRows:
    """Who sampled in a step, and where the new tokens belong."""

    step: int
    slots: list[int]
    num_top: int  # log-probabilities asked for, −1 for none
    positions: torch.Tensor  # [n] int64


class ModelRunner:
    def __init__(
        self,
        decoder: Decoder,
        layout: RankLayout,
        channels: Channels,
        tables: SlotTables,
        kv_cache: torch.Tensor,
    ) -> None:
        """kv_cache: [layers of this stage, 2, num_blocks, block_size, KV heads of this rank, head_dim]."""
        self._decoder = decoder
        self._layout = layout
        self._channels = channels
        self._tables = tables
        self._kv_cache = kv_cache
        self._device = kv_cache.device
        self._in_flight: deque[_SampledRows] = deque()  # first stage, pp > 1: sampled, not received
        self._results: dict[int, tuple[_SampledRows, Sampled]] = {}  # rank 0: received, not read

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> None:
        """Run this rank's part of one step.

        Collective: every rank of the engine, once for every plan, in order. On the first stage the ids of all
        steps ≤ plan.step − pp_size have been written to the slot tables before anything of this step is read.
        """
        self._receive_tokens(plan.step - self._layout.pp_size)
        self._tables.apply(plan)
        self._copy_blocks(plan.block_copies)
        if plan.num_rows:
            self._run_rows(plan)

    def result(self, step: int) -> StepResult:
        """The ids sampled in a step ≤ the last plan's − pp_size. Rank 0 only; each step once. Waits for the
        device if the step has not ended.
        """
        if step not in self._results:
            return StepResult(step, [])
        rows, sampled = self._results.pop(step)
        token_ids = sampled.token_ids.tolist()
        if sampled.logprobs is None or sampled.top_ids is None:
            return StepResult(step, token_ids)
        entries = zip(rows.slots, sampled.logprobs.tolist(), sampled.top_ids.tolist(), strict=True)
        return StepResult(step, token_ids, [self._logprobs(*entry) for entry in entries])

    def _run_rows(self, plan: StepPlan) -> None:
        batch, token_slots = self._gather(plan)
        hidden = self._decoder.forward(self._stage_input(batch, token_slots), batch, self._kv_cache)
        if not self._layout.is_last_stage:
            self._channels.pipe.send(hidden, self._layout.pp_rank + 1)
        if plan.sampled_slots:
            self._sample(plan, batch, hidden)

    def _gather(self, plan: StepPlan) -> tuple[TokenBatch, torch.Tensor]:
        tables = self._tables
        slots = to_device(plan.slots, torch.int64, self._device)
        cu_seqlens = to_device(plan.cu_seqlens, torch.int32, self._device)
        batch, token_slots = gather_batch(
            tables.num_computed, tables.block_table, slots, cu_seqlens, plan.num_tokens, tables.block_size
        )
        tables.num_computed[slots] = batch.seq_lens.long()
        return batch, token_slots

    def _stage_input(self, batch: TokenBatch, token_slots: torch.Tensor) -> torch.Tensor:
        if self._layout.is_first_stage:
            return self._decoder.embed(self._tables.token_ids[token_slots, batch.positions].long())
        hidden = self._kv_cache.new_empty(len(batch.positions), self._decoder.spec.hidden_size)
        return self._channels.pipe.recv(hidden, self._layout.pp_rank - 1)

    def _sample(self, plan: StepPlan, batch: TokenBatch, hidden: torch.Tensor) -> None:
        """Last stage: sample, and send the ids to the first. First stage: note that they will come."""
        slots = plan.sampled_slots
        index = to_device(plan.sampled_rows, torch.int64, self._device)
        num_top = num_top_logprobs([self._tables.sampling[slot] for slot in slots])
        rows = _SampledRows(plan.step, slots, num_top, batch.seq_lens[index].long())
        if self._layout.is_last_stage:
            last_tokens = batch.cu_seqlens_q[1:][index].long() - 1
            sampled = sample(self._decoder.logits(hidden[last_tokens]), slots, rows.positions, self._tables)
            if self._layout.is_first_stage:
                self._take_up(rows, sampled)
            else:
                self._send(sampled)
        elif self._layout.is_first_stage:
            self._in_flight.append(rows)

    def _send(self, sampled: Sampled) -> None:
        for tensor in sampled.tensors:
            self._channels.tokens.send(tensor, 0)

    def _receive_tokens(self, last_step: int) -> None:
        """Take the ids of every step up to last_step that the last stage has sampled for this one."""
        while self._in_flight and self._in_flight[0].step <= last_step:
            rows = self._in_flight.popleft()
            sampled = Sampled.empty(len(rows.slots), rows.num_top, self._device)
            for tensor in sampled.tensors:
                self._channels.tokens.recv(tensor, self._layout.pp_size - 1)
            self._take_up(rows, sampled)

    def _take_up(self, rows: _SampledRows, sampled: Sampled) -> None:
        """Make sampled ids the inputs of later steps, and on rank 0 a result."""
        slots = to_device(rows.slots, torch.int64, self._device)
        self._tables.write_tokens(slots, rows.positions, sampled.token_ids)
        if self._layout.rank == 0:
            self._results[rows.step] = rows, sampled

    def _logprobs(self, slot: int, values: list[float], top_ids: list[int]) -> TokenLogprobs | None:
        num_top = self._tables.sampling[slot].num_logprobs
        if num_top < 0:
            return None
        return TokenLogprobs(
            values[0], int(values[1]), tuple(top_ids[:num_top]), tuple(values[2 : 2 + num_top])
        )

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy on write, before anything of the step is written; no dst is another copy's src."""
        if copies:
            src, dst = (to_device(part, torch.int64, self._device) for part in zip(*copies, strict=True))
            self._kv_cache[:, :, dst] = self._kv_cache[:, :, src]
