"""ModelRunner: one rank's share of a step. StepPlan in, StepResult out (on rank 0).

Owns the slot tables and the KV cache. A step of decodes is one CUDA graph where there is a GPU; any other
step, and every step on a CPU, runs operation by operation through the same functions. Every
collective that it enters, and every shape, follows from the plans it was given, in their order. Knows no
request; called by the worker and the coordinator loops.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from distllm.comm.base import Channels
from distllm.config import EngineConfig
from distllm.kernels import compile_together, gather_batch
from distllm.kernels.batch import TokenBatch
from distllm.models.decoder import Decoder
from distllm.parallel.layout import RankLayout
from distllm.runtime.cuda_graphs import DecodeGraphs, PromptGraphs, prompt_shape, verification_shapes
from distllm.runtime.plan import StepPlan, StepResult, TokenLogprobs
from distllm.runtime.sampling.logits_processors import NamedProcessor, errors_of
from distllm.runtime.sampling.sampled import Logprobs, Sampled, SampledRows
from distllm.runtime.sampling.sampler import Sampler, num_top_logprobs
from distllm.runtime.slots import SlotTables
from distllm.runtime.staging import HostCopy, to_device


@dataclass(frozen=True)
class _DecodeOutput:
    """Of a captured step; overwritten by its next replay."""

    positions: torch.Tensor  # [n] int64, of the sampled tokens
    result: torch.Tensor  # the head's logits on the last stage, hidden states [n, hidden_size] elsewhere
    token_ids: torch.Tensor | None = None  # [n] int64, last stage: right where all rows are plain


class ModelRunner:
    def __init__(
        self,
        decoder: Decoder,
        layout: RankLayout,
        channels: Channels,
        tables: SlotTables,
        kv_cache: torch.Tensor,
        processors: Sequence[NamedProcessor] = (),
    ) -> None:
        """kv_cache: [layers of this stage, 2, num_blocks, block_size, KV heads of this rank, head_dim]."""
        self._decoder = decoder
        self._layout = layout
        self._channels = channels
        self._tables = tables
        self._kv_cache = kv_cache
        self._device = kv_cache.device
        if layout.is_last_stage:
            self._sampler = Sampler(decoder.head, tables, processors)
        self._decodes: DecodeGraphs[_DecodeOutput] | None = None
        self._prompts: list[PromptGraphs[tuple[TokenBatch, torch.Tensor]]] = []
        self._verified_len = 0  # tokens of a row that verifies at most, where verifications were rehearsed
        self._hidden_in: torch.Tensor | None = None  # where captured steps of later stages read
        self._in_flight: deque[SampledRows] = deque()  # first stage, pp > 1: sampled, not received
        self._unsampled: Callable[[], None] | None = None  # last stage: how the last step goes on
        self._results: dict[int, tuple[SampledRows, HostCopy]] = {}  # rank 0: received, not read

    @torch.inference_mode()
    def capture(self, config: EngineConfig) -> None:
        """Capture decodes of up to max_num_seqs rows, short prompt steps and verifications.

        Collective: every rank of the engine.
        """
        padding_slot, max_num_seqs = self._tables.padding_slot, config.max_num_seqs
        limits = config.max_num_batched_tokens, config.context_len
        row_len = 1 + config.speculation.num_speculative_tokens if config.speculation else 0
        shapes = verification_shapes(row_len, max_num_seqs, *limits)  # first: the better ones where they fit
        shapes.append(prompt_shape(*limits))
        if not self._layout.is_first_stage:
            rows = max(max_num_seqs, *(shape.longest for shape in shapes))
            self._hidden_in = self._kv_cache.new_empty(rows, self._decoder.spec.hidden_size)
        prompts = [
            PromptGraphs(partial(self._prompt, decode_len=shape.row_len), shape, padding_slot, self._device)
            for shape in shapes
        ]
        decodes = DecodeGraphs(self._decode, max_num_seqs, padding_slot, self._device)
        with compile_together():
            for graphs in prompts:
                graphs.rehearse()
            decodes.rehearse()
            if self._layout.is_last_stage:
                self._sampler.rehearse(self._kv_cache.new_zeros(4, self._decoder.spec.hidden_size))
        pool = torch.cuda.graph_pool_handle()
        for graphs in prompts:
            graphs.capture(pool)
        decodes.capture(pool)
        self._prompts, self._decodes, self._verified_len = prompts, decodes, row_len

    def release(self) -> None:
        """Forget captured steps, weights and KV cache: the runner is of no use any more. Before the
        communicators close: NCCL waits until no graph holds them.
        """
        self._decodes, self._prompts, self._hidden_in = None, [], None
        del self._decoder, self._kv_cache, self._tables
        if self._layout.is_last_stage:
            del self._sampler

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

    @torch.inference_mode()
    def sample(self, masks: dict[int, bytes]) -> None:
        """Sample the step that was run last, under these masks besides its plan's own.

        Collective: every rank of the engine, once after a plan that awaits masks.
        """
        self._tables.token_masks |= masks
        sample, self._unsampled = self._unsampled, None
        if sample is not None:
            sample()

    def _sample_when_allowed(self, plan: StepPlan, sample: Callable[[], None]) -> None:
        if plan.awaits_masks:
            self._unsampled = sample
        else:
            sample()

    def result(self, step: int) -> StepResult:
        """The ids sampled in a step ≤ the last plan's − pp_size. Rank 0 only; each step once. Waits for the
        device if the step has not ended.
        """
        if step not in self._results:
            return StepResult(step, [])
        rows, copy = self._results.pop(step)
        sampled = Sampled.of_parts(rows, copy.wait())
        logprobs = self._limited(rows, sampled.logprobs) if sampled.logprobs else None
        scores = sampled.scores.tolist() if sampled.scores else []
        texts = errors_of(sampled.errors) if sampled.errors is not None else []
        errors = {entry: text for entry, text in zip(rows.processed, texts, strict=True) if text}
        return StepResult(step, sampled.token_ids.tolist(), logprobs, scores, errors)

    def _run_rows(self, plan: StepPlan) -> None:
        if self._decodes is not None and not plan.prefills:
            self._replay_decode(plan, self._decodes)
            return
        batch, hidden = self._forward_rows(plan)
        self._send_hidden(hidden)
        if plan.sampled_slots or plan.scored_rows:
            self._sample(plan, batch, hidden)

    def _forward_rows(self, plan: StepPlan) -> tuple[TokenBatch, torch.Tensor]:
        """The rows through this stage's layers; rows and tokens of a captured step are followed by
        padding.
        """
        hidden = self._receive_hidden(plan)
        row_len = max((row.num_tokens for row in plan.prefills), default=1)
        fitting = [each for each in self._prompts if each.fits(plan.num_rows, plan.num_tokens, row_len)]
        if not fitting:
            slots = to_device(plan.slots, torch.int64, self._device)
            cu_seqlens = to_device(plan.cu_seqlens, torch.int32, self._device)
            rows = slots, cu_seqlens, plan.num_tokens
            if row_len <= self._verified_len:  # as rehearsed
                return self._forward(*rows, plan.num_rows, hidden, self._verified_len)
            return self._forward(*rows, len(plan.decode_slots), hidden)
        if hidden is not None and self._hidden_in is not None:
            self._hidden_in[: plan.num_tokens] = hidden
        batch, hidden = fitting[0].replay(plan.slots, plan.cu_seqlens)
        # Sent on, it would be overwritten by the next replay while it is on its way.
        return batch, hidden if self._layout.is_last_stage else hidden[: plan.num_tokens].clone()

    def _forward(
        self,
        slots: torch.Tensor,
        cu_seqlens: torch.Tensor,
        num_tokens: int,
        num_decodes: int,
        hidden: torch.Tensor | None,
        decode_len: int = 1,
    ) -> tuple[TokenBatch, torch.Tensor]:
        """This stage's layers over the rows' next tokens. hidden: None on the first stage, which embeds."""
        tables = self._tables
        known = tables.num_computed, tables.block_table
        batch, token_slots = gather_batch(
            *known, slots, cu_seqlens, num_tokens, tables.block_size, num_decodes, decode_len
        )
        tables.advance(slots, batch.seq_lens)
        if hidden is None:
            hidden = self._decoder.embed(tables.token_ids[token_slots, batch.positions], batch.positions)
        return batch, self._decoder.forward(hidden, batch, self._kv_cache)

    def _prompt(
        self, slots: torch.Tensor, cu_seqlens: torch.Tensor, num_tokens: int, decode_len: int = 0
    ) -> tuple[TokenBatch, torch.Tensor]:
        """As _forward, with hidden states from where they do not move: what a graph captures. decode_len: 0,
        or no row has more tokens. Which rows of a replayed prompt step are decodes is not fixed, so there
        none is known to be one.
        """
        hidden = None if self._hidden_in is None else self._hidden_in[:num_tokens]
        num_decodes = len(slots) if decode_len else 0
        return self._forward(slots, cu_seqlens, num_tokens, num_decodes, hidden, max(1, decode_len))

    def _decode(self, slots: torch.Tensor) -> _DecodeOutput:
        """One token of each slot, from the tables and back into them: what a graph captures."""
        cu_seqlens = torch.arange(len(slots) + 1, dtype=torch.int32, device=self._device)
        batch, hidden = self._prompt(slots, cu_seqlens, len(slots), decode_len=1)
        positions = batch.seq_lens.long()
        if not self._layout.is_last_stage:
            return _DecodeOutput(positions, hidden)
        shard = self._decoder.head(hidden)
        token_ids = self._sampler.sample_plain(shard, slots, positions)
        self._tables.write_tokens(slots, positions, token_ids)
        return _DecodeOutput(positions, shard, token_ids)

    def _replay_decode(self, plan: StepPlan, graphs: DecodeGraphs[_DecodeOutput]) -> None:
        slots = plan.decode_slots
        if self._hidden_in is not None:
            self._channels.pipe.recv(self._hidden_in[: len(slots)], self._layout.pp_rank - 1)
        output = graphs.replay(slots)
        # What is sent on would be overwritten by the next replay while it is on its way.
        result, rows = output.result[: len(slots)], self._sampled_rows(plan, output.positions[: len(slots)])
        if not self._layout.is_last_stage:
            self._send_hidden(result.clone())
            self._expect(replace(rows, positions=rows.positions.clone()))
        else:
            self._sample_when_allowed(plan, partial(self._sample_decoded, rows, output))

    def _sample_decoded(self, rows: SampledRows, output: _DecodeOutput) -> None:
        """Last stage: of a captured step, which has sampled as if all rows were plain."""
        num_rows = len(rows.slots)
        if output.token_ids is None or self._tables.special_rows(rows.slots):
            self._pass_on(rows, self._sampler.sample(output.result[:num_rows], rows.slots, rows.positions))
        elif self._layout.is_first_stage:  # the tokens are in the tables
            self._keep_result(rows, Sampled(output.token_ids[:num_rows]))
        else:
            self._send(Sampled(output.token_ids[:num_rows].clone()))

    def _sampled_rows(self, plan: StepPlan, positions: torch.Tensor) -> SampledRows:
        slots, scored = plan.sampled_slots, [row for _, row in plan.scored_rows]
        special = self._tables.special_rows(slots)
        num_top, processed = num_top_logprobs(special), []
        if any(row.is_processed for row in special):
            sampling = self._tables.sampling
            processed = [entry for entry, slot in enumerate(slots) if sampling[slot].is_processed]
        asked = [self._tables.sampling[row.slot].num_prompt_logprobs for row in scored]
        num_scored = sum(row.num_scored for row in scored)
        prompt_top = max(asked, default=-1)
        return SampledRows(plan.step, slots, positions, num_top, num_scored, prompt_top, tuple(processed))

    def _receive_hidden(self, plan: StepPlan) -> torch.Tensor | None:
        if self._layout.is_first_stage:
            return None
        hidden = self._kv_cache.new_empty(plan.num_tokens, self._decoder.spec.hidden_size)
        return self._channels.pipe.recv(hidden, self._layout.pp_rank - 1)

    def _send_hidden(self, hidden: torch.Tensor) -> None:
        if not self._layout.is_last_stage:
            self._channels.pipe.send(hidden, self._layout.pp_rank + 1)

    def _sample(self, plan: StepPlan, batch: TokenBatch, hidden: torch.Tensor) -> None:
        """Last stage: sample, and send the ids to the first. First stage: note that they will come."""
        places = np.array(plan.sampled_places, dtype=np.int64).reshape(-1, 2).T
        index, back = to_device(places, torch.int64, self._device)
        rows = self._sampled_rows(plan, batch.seq_lens[index].long() - back)
        if not self._layout.is_last_stage:
            self._expect(rows)
            return
        scores = self._score(plan, batch, hidden, rows.num_prompt_top) if rows.num_scored else None
        if not rows.slots:
            self._pass_on(rows, replace(Sampled.empty(rows, self._device), scores=scores))
            return
        ends = batch.cu_seqlens_q[1:][index].long()
        shard = self._decoder.head(hidden[ends - 1 - back])
        self._sample_when_allowed(plan, partial(self._sample_rows, rows, shard, scores))

    def _sample_rows(self, rows: SampledRows, shard: torch.Tensor, scores: Logprobs | None) -> None:
        """Last stage: from the head's logits, one row for each token."""
        sampled = self._sampler.sample(shard, rows.slots, rows.positions)
        self._pass_on(rows, replace(sampled, scores=scores))

    def _score(self, plan: StepPlan, batch: TokenBatch, hidden: torch.Tensor, num_top: int) -> Logprobs:
        """Last stage: of the prompts' tokens behind those of plan.scored_rows."""
        rows = plan.scored_rows
        places = np.concatenate([np.arange(begin, begin + row.num_scored) for begin, row in rows])
        owners = np.repeat([row.slot for _, row in rows], [row.num_scored for _, row in rows])
        index, slots = to_device(np.stack([places, owners]), torch.int64, self._device)
        token_ids = self._tables.token_ids[slots, batch.positions[index].long() + 1]
        return self._sampler.score(hidden[index], token_ids.long(), num_top)

    def _pass_on(self, rows: SampledRows, sampled: Sampled) -> None:
        """From the last stage to the tables of the first."""
        if self._layout.is_first_stage:
            self._take_up(rows, sampled)
            return
        # Penalties and n-grams are of what the last stage knows.
        slots = to_device(rows.slots, torch.int64, self._device)
        self._tables.write_tokens(slots, rows.positions, sampled.token_ids)
        self._send(sampled)

    def _expect(self, rows: SampledRows) -> None:
        if self._layout.is_first_stage:
            self._in_flight.append(rows)

    def _send(self, sampled: Sampled) -> None:
        for tensor in sampled.messages:
            self._channels.tokens.send(tensor, 0)

    def _receive_tokens(self, last_step: int) -> None:
        """Take the ids of every step up to last_step that the last stage has sampled for this one."""
        while self._in_flight and self._in_flight[0].step <= last_step:
            rows = self._in_flight.popleft()
            sampled = Sampled.empty(rows, self._device)
            for tensor in sampled.messages:
                self._channels.tokens.recv(tensor, self._layout.pp_size - 1)
            self._take_up(rows, sampled)

    def _take_up(self, rows: SampledRows, sampled: Sampled) -> None:
        """Make sampled ids the inputs of later steps, and on rank 0 a result."""
        slots = to_device(rows.slots, torch.int64, self._device)
        self._tables.write_tokens(slots, rows.positions, sampled.token_ids)
        self._keep_result(rows, sampled)

    def _keep_result(self, rows: SampledRows, sampled: Sampled) -> None:
        if self._layout.rank == 0:
            self._results[rows.step] = rows, HostCopy(sampled.parts)

    def _limited(self, rows: SampledRows, logprobs: Logprobs) -> list[TokenLogprobs | None]:
        """Each row's, as many as it asked for."""
        asked = [self._tables.sampling[slot].num_logprobs for slot in rows.slots]
        return [
            entry.limited(num_top) if num_top >= 0 else None
            for entry, num_top in zip(logprobs.tolist(), asked, strict=True)
        ]

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy on write, before anything of the step is written; no dst is another copy's src."""
        if copies:
            src, dst = (to_device(part, torch.int64, self._device) for part in zip(*copies, strict=True))
            self._kv_cache[:, :, dst] = self._kv_cache[:, :, src]
