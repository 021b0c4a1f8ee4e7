"""LLM: the Python API. One script for one rank or many; every rank runs the same lines, rank 0 gets the
results.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from distllm.comm.agree import agree
from distllm.comm.connect import open_channels, open_control
from distllm.comm.devices import select_device
from distllm.config import EngineConfig
from distllm.engine import (
    WeightSource,
    eos_token_ids,
    open_source,
    read_generation_config,
    resolve_model,
)
from distllm.engine.chat import Chat, as_conversations, load_chat_format
from distllm.engine.tokenizers import load_tokenizer
from distllm.errors import DistllmError, RequestError, UserError
from distllm.models.shards import check_layout
from distllm.parallel.layout import RankLayout
from distllm.runtime.admission import Admission, Prompt
from distllm.runtime.beams.beam_generation import BeamGeneration
from distllm.runtime.beams.beam_search_params import BeamSearchParams
from distllm.runtime.coordinator import Coordinator, Watch
from distllm.runtime.garbage import old_objects_spared
from distllm.runtime.generation import Generation
from distllm.runtime.kv_memory import kv_block_count
from distllm.runtime.loaded_model import LoadedModel
from distllm.runtime.outputs import BeamSearchOutput, RequestOutput, ScoreOutput, score_output
from distllm.runtime.sampling.logits_processors import LogitsProcessor, NamedProcessor
from distllm.runtime.sampling.sampling_params import (
    GENERATION_FIELDS,
    SamplingParams,
    default_sampling_params,
)
from distllm.runtime.scheduler import Scheduler, SchedulerConfig
from distllm.runtime.speculation.open import load_draft, open_speculation
from distllm.runtime.speculation.speculation import Speculation, SpeculationStats
from distllm.runtime.worker import run_worker

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

    from distllm.comm.base import Control
    from distllm.engine.load import Progress

logger = logging.getLogger(__name__)

Work = TypeVar("Work", Generation, BeamGeneration)


class LLM:
    """A model loaded over the ranks of a job.

        with LLM("demo", tensor_parallel_size=2) as llm:
            outputs = llm.generate("Once upon a time", SamplingParams(max_tokens=64))
            if llm.is_root:
                print(outputs[0].outputs[0].text)

    Every method but abort() is collective: every rank calls it with the same arguments, in the same order;
    prompts matter on rank 0 alone. Without comm, one rank uses no MPI, and several use MPI.COMM_WORLD.
    """

    def __init__(
        self,
        model: str,
        *,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        comm: Intracomm | Control | None = None,
        progress: Progress | None = None,
        logits_processors: Mapping[str, LogitsProcessor] | None = None,
        **options: Any,
    ) -> None:
        """model: "demo", a Hugging Face folder or an engine folder. options: the other fields of
        EngineConfig. progress: called with (bytes loaded, bytes in all) of this rank as weights are read.
        logits_processors: Python that requests name in SamplingParams, the same on every rank; the steps of
        such a request wait for the device, and what goes wrong in one ends that request alone.

        Raises UserError, the same on every rank, for whatever cannot work.
        """
        self.config = EngineConfig(
            model=model,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            **options,
        )
        self._in_use = self._closed = False
        self._speculation: Speculation | None = None  # on rank 0
        self._progress = progress
        self._processors = dict(logits_processors or {})
        self._control = open_control(comm, tensor_parallel_size * pipeline_parallel_size)
        try:
            self._start()
        except UserError:
            self._control.close()
            raise

    @property
    def is_root(self) -> bool:
        return self._control.rank == 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt; the outputs in the order of the prompts on rank 0, an empty list elsewhere.

        prompts: text, token ids, or a list of these. sampling_params: one for all, or one each; without,
        get_default_sampling_params().
        Raises RequestError, on every rank, if any prompt or parameter is refused.
        """
        with self._use():
            if not self.is_root:
                run_worker(self._control, *self._runners)
                return []
            return self._finish(self._admit(lambda: prompts, sampling_params, priority))

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several: generate() after the model's own chat format.

        messages: [{"role": "user", "content": "…"}, …], or a list of such lists; they matter on rank 0 alone.
        tools: JSON schemas. chat_template_kwargs: other variables of the template.
        Raises RequestError, on every rank, where there is no format or it refuses the messages.
        """
        with self._use():
            if not self.is_root:
                run_worker(self._control, *self._runners)
                return []

            def prompts() -> list[Prompt]:
                return self._chat_prompts(messages, tools, add_generation_prompt, chat_template_kwargs or {})

            return self._finish(self._admit(prompts, sampling_params, None))

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams | Sequence[BeamSearchParams],
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of every prompt, found by beam search, in the order of the prompts on
        rank 0; an empty list elsewhere.

        prompts: as in generate(). params: one for all, or one each.
        Raises RequestError, on every rank, if any prompt or parameter is refused.
        """
        with self._use():
            if not self.is_root:
                run_worker(self._control, *self._runners)
                return []
            searches = self._queue(lambda: self._admission.admit_beams(prompts, params))
            for _ in self._coordinator.run([]):
                pass
            return [search.output() for search in searches]

    def score(self, prompts: Prompt | Sequence[Prompt]) -> list[ScoreOutput]:
        """The log-likelihood of each text, token by token: of prompts in their order on rank 0, an empty list
        elsewhere. A text may have max_model_len − 1 tokens.

        Raises RequestError, on every rank, if any prompt is refused.
        """
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        return [score_output(output) for output in self.generate(prompts, params)]

    def speculation_stats(self) -> SpeculationStats | None:
        """How guesses have fared since the LLM was made; None without speculative_config. Rank 0 only, not
        collective."""
        return self._speculation.stats if self._speculation is not None else None

    def get_default_sampling_params(self) -> SamplingParams:
        """What generate() uses where it is given none: the model's generation_config.json over the library's
        defaults. Not collective; the same on every rank. Change some with dataclasses.replace.
        """
        return self._default_sampling_params

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
    ) -> Iterator[RequestOutput]:
        """As generate(), but yield increments as they come: text and token_ids are what is new.

        Every rank iterates to the end; ranks other than 0 get nothing from it. Leaving the loop early on rank
        0 aborts what is left.
        """
        with self._use():
            if not self.is_root:
                run_worker(self._control, *self._runners)
                return
            generations = self._admit(lambda: prompts, sampling_params, priority)
            with closing(self._coordinator.run(generations)) as changed:
                for generation in changed:
                    increment = generation.increment()
                    if increment is not None:
                        yield increment

    @contextmanager
    def watch_steps(self, watch: Watch) -> Iterator[None]:
        """Inside, rank 0 enters watch(name) around each part of a step (coordinator.PARTS): for profilers.

        Not collective; on other ranks nothing changes.
        """
        if not self.is_root:
            yield
            return
        self._coordinator.watch = watch
        try:
            yield
        finally:
            self._coordinator.watch = nullcontext

    def abort(self, request_id: str) -> None:
        """End a prompt that stream() is working on, with all its samples, wherever they stand; its last
        output says finish_reason "abort". An id that is unknown or finished is ignored.

        Not collective: rank 0 calls it inside its loop over stream(). Raises DistllmError anywhere else.
        """
        if self._closed or not self._in_use:
            raise DistllmError(
                f"abort({request_id!r}) outside of a stream(); call it in rank 0's loop over one"
            )
        self._coordinator.abort(request_id)

    def close(self) -> None:
        """Free the communicators and the memory. Collective; calling it twice is harmless. After an
        interruption it only forgets.
        """
        if self.is_root:
            self._admission.grammars.close()
        if not self._closed and not self._in_use:
            for runner in self._runners:
                runner.release()
            self._channels.close()
            self._control.close()
        self._closed = True

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An error that is not the same on every rank must not lead into a collective.
        if error is None or isinstance(error, UserError):
            self.close()

    def _start(self) -> None:
        """Bring up this rank's part. Collective. What one rank alone can find wrong is raised on all of
        them.
        """
        started, control, config = time.perf_counter(), self._control, self.config
        layout = RankLayout(config.tensor_parallel_size, config.pipeline_parallel_size)
        layout.check_world_size(control.size)
        self.layout = layout.at(control.rank)
        source = agree(control, lambda: open_source(resolve_model(config.model), config.load_format))
        check_layout(source.spec, self.layout)
        device = select_device(control)
        self.config = config.resolve(source.spec.max_position_embeddings)
        self._channels = open_channels(control, self.layout, device)
        num_blocks = self._load(source, device)
        agree(control, lambda: self._start_serving(source, num_blocks))
        what = f"{source.path.name}: {layout.equation}, {num_blocks} KV blocks of {config.block_size} tokens"
        logger.info("%s, ready in %.1f s", what, time.perf_counter() - started)

    def _load(self, source: WeightSource, device: torch.device) -> int:
        """The model, and the draft model where there is one; returns how many KV blocks each has."""
        control, config, spec = self._control, self.config, source.spec
        self.spec, self.device, self.dtype = spec, device, resolve_dtype(config.dtype, spec.dtype, device)
        context = config.context_len, self.dtype, device
        model = agree(
            control,
            lambda: LoadedModel.load(source, self.layout, self._channels, *context, self._progress),
        )
        draft = agree(control, lambda: load_draft(config, spec, self._channels, self.layout, *context))
        models = [model] if draft is None else [model, draft]
        block_bytes = sum(each.block_bytes(config.block_size) for each in models)
        num_blocks = kv_block_count(config, spec, block_bytes, control, device)
        processors = [NamedProcessor(*item) for item in self._processors.items()]
        self._runners = [each.start(config, num_blocks, processors) for each in models]
        return num_blocks

    def _start_serving(self, source: WeightSource, num_blocks: int) -> None:
        """Read what every rank is asked for; make what serves requests on rank 0."""
        generation_config = read_generation_config(source.path)
        if self.config.generation_config == "vllm":
            generation_config = {}
        self._default_sampling_params = default_sampling_params(generation_config)
        if not self.is_root:
            return
        log_generation_config(generation_config)
        self._start_coordinator(source, num_blocks)
        tokenizer = load_tokenizer(source.path)
        self._chat_format = load_chat_format(source.path, tokenizer) if tokenizer else None
        stops = {*eos_token_ids(source.path), *(tokenizer.stop_token_ids if tokenizer else ())}
        self._admission = Admission(
            tokenizer,
            source.spec.vocab_size,
            self.config.context_len,
            sorted(stop for stop in stops if stop < source.spec.vocab_size),
            self.config.seed,
            list(self._processors),
            self.config.speculation,
        )
        self._admission.grammars.start()

    def _start_coordinator(self, source: WeightSource, num_blocks: int) -> None:
        config = self.config
        runner, *drafts = self._runners
        self._speculation = open_speculation(config, source.spec.vocab_size, self._control, drafts)
        scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=config.context_len,
                block_size=config.block_size,
                num_blocks=num_blocks,
                enable_prefix_caching=config.enable_prefix_caching,
                depth=config.pipeline_parallel_size,
            ),
            self._speculation,
        )
        self._coordinator = Coordinator(self._control, scheduler, runner, config.pipeline_parallel_size)

    def _chat_prompts(
        self,
        messages: Sequence[Any],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> list[Prompt]:
        if self._chat_format is None:
            raise RequestError(
                "the model folder has no chat template and its family no chat format; "
                "add a chat_template.jinja or use generate()"
            )
        chats = [
            Chat(conversation, tools, add_generation_prompt, variables)
            for conversation in as_conversations(messages)
        ]
        rendered = [self._chat_format.render(chat) for chat in chats]
        return [{"prompt": text, "prompt_token_ids": token_ids} for text, token_ids in rendered]

    def _finish(self, generations: list[Generation]) -> list[RequestOutput]:
        for _ in self._coordinator.run(generations):
            pass
        return [generation.output() for generation in generations]

    def _admit(
        self,
        make_prompts: Callable[[], Prompt | Sequence[Prompt]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
    ) -> list[Generation]:
        params = self._default_sampling_params if sampling_params is None else sampling_params
        return self._queue(lambda: self._admission.admit_all(make_prompts(), params, priority))

    def _queue(self, admit: Callable[[], list[Work]]) -> list[Work]:
        """Check and queue on rank 0; what is refused here is refused on every rank."""
        try:
            works = admit()
            self._coordinator.admit([request for work in works for request in work.requests])
        except RequestError as error:
            self._coordinator.refuse(str(error))
            raise
        return works

    @contextmanager
    def _use(self) -> Iterator[None]:
        """One piece of work at a time. An error in the middle of it leaves the ranks out of step for good."""
        if self._in_use or self._closed:
            raise DistllmError(
                "this LLM is closed, in use or was interrupted; finish the stream or make a new LLM"
            )
        self._in_use = True
        try:
            with old_objects_spared():
                yield
        except (RequestError, GeneratorExit):
            self._in_use = False
            raise
        self._in_use = False


def resolve_dtype(name: str, of_checkpoint: str, device: torch.device) -> torch.dtype:
    """What `auto` stands for: the checkpoint's own on a GPU. On a CPU float32: CPUs have no fast bf16, and in
    fp32 every layout gives the same tokens.
    """
    if name == "auto":
        name = of_checkpoint if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def log_generation_config(generation_config: Mapping[str, Any]) -> None:
    """Once at start, so that nobody wonders why a text differs."""
    values = {name: generation_config.get(name) for name in GENERATION_FIELDS}
    given = [f"{name} {value}" for name, value in values.items() if value is not None]
    if given:
        logger.info("default sampling from generation_config.json: %s", ", ".join(given))
