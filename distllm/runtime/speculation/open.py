"""Makes what a SpeculativeConfig asks for: the draft model on its ranks, the proposer on rank 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distllm.comm.base import Channels, Control
from distllm.comm.local import LocalControl
from distllm.config import EngineConfig
from distllm.engine import open_source, resolve_model
from distllm.errors import ConfigError
from distllm.models.shards import check_layout
from distllm.models.spec import DecoderSpec
from distllm.parallel.layout import RankLayout
from distllm.runtime.loaded_model import LoadedModel
from distllm.runtime.model_runner import ModelRunner
from distllm.runtime.plan import StepPlan
from distllm.runtime.plan_codec import encode
from distllm.runtime.speculation.custom import CustomProposer
from distllm.runtime.speculation.draft_model import DraftProposer
from distllm.runtime.speculation.ngram import NgramProposer
from distllm.runtime.speculation.proposer import Proposer
from distllm.runtime.speculation.speculation import Speculation
from distllm.runtime.speculation.switch import SpeculationSwitch


def load_draft(
    config: EngineConfig,
    target: DecoderSpec,
    channels: Channels,
    layout: RankLayout,
    context_len: int,
    dtype: torch.dtype,
    device: torch.device,
) -> LoadedModel | None:
    """This rank's share of the draft model: rank 0 has all of it, or the ranks of the first stage share it as
    they share the target. None elsewhere, and where there is no draft model.

    Not collective. Raises ConfigError, on every rank, if the two models do not go together.
    """
    speculation = config.speculation
    if speculation is None or speculation.model is None:
        return None
    source = open_source(resolve_model(speculation.model), config.load_format)
    _check_pair(speculation.model, source.spec, target, context_len)
    tp_size = speculation.draft_tensor_parallel_size
    whole = RankLayout(tp_size, 1)
    check_layout(source.spec, whole)
    if layout.rank >= tp_size:
        return None
    alone = LocalControl()
    tp = channels.tp if tp_size > 1 else alone.split(0, 0, "draft tp")
    own = Channels(alone, tp, alone.split(0, 0, "draft pipe"), alone.split(0, 0, "draft tokens"))
    return LoadedModel.load(source, whole.at(layout.rank), own, context_len, dtype, device)


def _check_pair(name: str, draft: DecoderSpec, target: DecoderSpec, context_len: int) -> None:
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"speculative_config: the vocabulary of {name} has {draft.vocab_size} tokens, the model's "
            f"{target.vocab_size}; a draft model must have the model's own tokenizer"
        )
    if draft.max_position_embeddings < context_len:
        raise ConfigError(
            f"speculative_config: the window of {name} is {draft.max_position_embeddings}, max_model_len is "
            f"{context_len}: lower max_model_len or choose another draft model"
        )


def open_speculation(
    config: EngineConfig, vocab_size: int, control: Control, draft_runners: Sequence[ModelRunner]
) -> Speculation | None:
    """Rank 0's part. draft_runners: the draft model's, if there is one."""
    wanted = config.speculation
    if wanted is None:
        return None
    proposer: Proposer
    if wanted.method == "ngram":
        proposer = NgramProposer(wanted.prompt_lookup_min, wanted.prompt_lookup_max)
    elif wanted.proposer is not None:
        proposer = CustomProposer(wanted.proposer, vocab_size)
    else:
        proposer = _draft_proposer(config, control, *draft_runners)
    num_stages = config.pipeline_parallel_size
    switch = SpeculationSwitch(cycle=num_stages + 1)
    return Speculation(proposer, wanted.num_speculative_tokens, switch, together=num_stages == 1)


def _draft_proposer(config: EngineConfig, control: Control, runner: ModelRunner) -> DraftProposer:
    assert config.speculation is not None, "it has a draft model"
    is_shared = config.speculation.draft_tensor_parallel_size > 1

    def run(plan: StepPlan) -> None:
        if is_shared:
            control.bcast(encode(plan, for_draft=True))
        runner.run(plan)

    return DraftProposer(run, runner.result, config.max_num_batched_tokens)
