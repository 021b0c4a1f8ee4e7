"""From what the user wrote to Requests: prompts tokenised, every bound checked, seeds and limits made
definite.

Runs on rank 0 before anything of the batch is admitted, so that a refused request harms no other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from distllm.config import SpeculativeConfig
from distllm.engine.tokenizers import Tokenizer
from distllm.errors import RequestError
from distllm.runtime.beams.beam_generation import BeamGeneration
from distllm.runtime.beams.beam_search import count_logprobs
from distllm.runtime.beams.beam_search_params import BeamSearchParams
from distllm.runtime.generation import Generation
from distllm.runtime.plan import RowSampling
from distllm.runtime.request import Request
from distllm.runtime.sampling.logit_controls import NO_CONTROLS, LogitControls
from distllm.runtime.sampling.sampling_params import SamplingParams
from distllm.runtime.speculation.drafting import Drafting
from distllm.runtime.structured.constraint import Constraint
from distllm.runtime.structured.grammars import Grammars

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]

Admitted = TypeVar("Admitted")

GREEDY_BELOW = 1e-5  # temperatures under this are greedy: dividing by them would overflow


def as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list. A list of integers is one prompt of token ids."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(
            f"prompts is a {type(prompts).__name__}; it must be text, token ids or a list of these"
        )
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _check_kind(work: str, params: Any, wanted: type) -> None:
    """Each kind of work has parameters of its own: what is not among them is refused, not ignored."""
    for each in params if isinstance(params, Sequence) else (params,):
        if not isinstance(each, wanted):
            raise RequestError(f"params are {type(each).__name__}; {work} takes {wanted.__name__}")


class Admission:
    """Makes Generations; numbers requests and draws seeds in the order of its calls."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: Sequence[int],
        seed: int,
        processors: Sequence[str] = (),
        speculation: SpeculativeConfig | None = None,
    ) -> None:
        """processors: the names that SamplingParams.logits_processors may hold."""
        self._speculation = speculation
        self._processors = {name: number for number, name in enumerate(processors)}
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._eos = tuple(eos_token_ids)
        self.grammars = Grammars(tokenizer, vocab_size, self._eos)
        self._random = random.Random(seed)
        self._count = 0

    def admit_all(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        priorities: Sequence[int] | None = None,
    ) -> list[Generation]:
        """A Generation for each prompt. Raises RequestError that names the prompt; then none is admitted."""
        _check_kind("generate", params, SamplingParams)
        priority = 0 if priorities is None else priorities
        return self._each(self._admit, prompts, {"sampling_params": params, "priorities": priority})

    def admit_beams(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams | Sequence[BeamSearchParams]
    ) -> list[BeamGeneration]:
        """As admit_all, for beam search."""
        _check_kind("beam_search", params, BeamSearchParams)
        return self._each(self._admit_beam, prompts, {"params": params})

    def _each(
        self,
        admit: Callable[..., Admitted],
        prompts: Prompt | Sequence[Prompt],
        columns: Mapping[str, Any],
    ) -> list[Admitted]:
        """admit(prompt, …) with what the columns hold for it."""
        listed = as_prompt_list(prompts)
        if not listed:
            raise RequestError("the list of prompts is empty; give at least one prompt")
        spread = [self._spread(name, value, len(listed)) for name, value in columns.items()]
        admitted = []
        for number, item in enumerate(zip(listed, *spread, strict=True)):
            try:
                admitted.append(admit(*item))
            except RequestError as error:
                raise RequestError(f"prompt {number}: {error}" if len(listed) > 1 else str(error)) from None
        return admitted

    @staticmethod
    def _spread(name: str, value: Any, count: int) -> list[Any]:
        """One value for all prompts, or one each."""
        if not isinstance(value, Sequence):
            return [value] * count
        if len(value) != count:
            raise RequestError(
                f"{name} has {len(value)} entries for {count} prompts; give one, or one for each"
            )
        return list(value)

    def _admit(self, prompt: Prompt, params: SamplingParams, priority: int) -> Generation:
        text, token_ids = self._tokenize(prompt)
        self._check_length(token_ids)
        for token_id in params.stop_token_ids or ():
            self._check_token_id("stop_token_ids", token_id)
        if params.stop_strings and self._tokenizer is None:
            raise RequestError(
                "stop strings need a tokenizer, and the model folder has none; use stop_token_ids"
            )
        request_id, self._count = str(self._count), self._count + 1
        requests = self._make_requests(request_id, tuple(token_ids), params, priority)
        return Generation(request_id, text, params, requests, self._tokenizer)

    def _admit_beam(self, prompt: Prompt, params: BeamSearchParams) -> BeamGeneration:
        _, token_ids = self._tokenize(prompt)
        self._check_length(token_ids)
        num_logprobs = count_logprobs(params, self._eos)
        if num_logprobs > self._vocab_size:
            raise RequestError(
                f"beam_width is {params.beam_width}: {num_logprobs} continuations of each are looked at, "
                f"the vocabulary has {self._vocab_size}; lower beam_width"
            )
        request_id, self._count = str(self._count), self._count + 1
        max_tokens = min(params.max_tokens, self._max_model_len - len(token_ids))
        return BeamGeneration(request_id, token_ids, params, max_tokens, self._eos, self._tokenizer)

    def _make_requests(
        self, request_id: str, token_ids: tuple[int, ...], params: SamplingParams, priority: int
    ) -> list[Request]:
        room = self._max_model_len - len(token_ids)
        stops = frozenset([*(() if params.ignore_eos else self._eos), *(params.stop_token_ids or ())])
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        controls = self._controls(params)
        constraints = self._constraints(params, stops)
        requests: list[Request] = []
        for index in range(params.n):
            requests.append(
                Request(
                    request_id=f"{request_id}.{index}" if params.n > 1 else request_id,
                    prompt_token_ids=token_ids,
                    max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
                    sampling=self._row_sampling(params, seed + index, stops, controls, scores=index == 0),
                    stop_token_ids=stops,
                    priority=priority,
                    fork_from=requests[0] if requests else None,
                    index=index,
                    constraint=constraints[index],
                    drafting=self._drafting(params),
                )
            )
        return requests

    def _drafting(self, params: SamplingParams) -> Drafting | None:
        if self._speculation is None or not params.speculate:
            return None
        return Drafting(limit=self._speculation.num_speculative_tokens)

    def _constraints(self, params: SamplingParams, stops: frozenset[int]) -> Sequence[Constraint | None]:
        """One for each sample; None where the text may have any form."""
        form = params.structured_outputs
        if form is None:
            return [None] * params.n
        return self.grammars.constraints(form, params.n, params.min_tokens, sorted(stops))

    def _row_sampling(
        self,
        params: SamplingParams,
        seed: int,
        stops: frozenset[int],
        controls: LogitControls | None,
        scores: bool,
    ) -> RowSampling:
        """scores: this one of the n samples scores the prompt that they share, if that is asked for."""
        # A constraint keeps the end away itself: it knows where nothing else is left.
        min_tokens = 0 if params.structured_outputs else params.min_tokens
        # min_tokens keeps even an ignored eos away, as in vLLM.
        forbidden = sorted(stops.union(self._eos)) if min_tokens else []
        return RowSampling(
            temperature=0.0 if params.temperature < GREEDY_BELOW else float(params.temperature),
            top_k=min(max(params.top_k, 0), self._vocab_size),
            top_p=float(params.top_p),
            min_p=float(params.min_p),
            seed=(seed + 2**63) % 2**64 - 2**63,
            num_logprobs=self._num_logprobs(params.logprobs),
            num_prompt_logprobs=self._num_logprobs(params.prompt_logprobs) if scores else -1,
            min_tokens=min_tokens,
            stop_token_ids=tuple(forbidden),
            typical_p=1.0 if params.temperature < GREEDY_BELOW else float(params.typical_p),
            controls=controls,
        )

    def _num_logprobs(self, asked: int | None) -> int:
        return -1 if asked is None else min(asked, self._vocab_size)

    def _controls(self, params: SamplingParams) -> LogitControls | None:
        """None where the request changes nothing."""
        for field in ("allowed_token_ids", "logit_bias"):
            for token_id in getattr(params, field) or ():
                self._check_token_id(field, token_id)
        controls = LogitControls(
            allowed_token_ids=tuple(dict.fromkeys(params.allowed_token_ids or ())),
            bad_words=self._bad_words(params.bad_words or ()),
            no_repeat_ngram_size=params.no_repeat_ngram_size,
            logit_bias=tuple((token_id, float(v)) for token_id, v in (params.logit_bias or {}).items()),
            repetition_penalty=float(params.repetition_penalty),
            presence_penalty=float(params.presence_penalty),
            frequency_penalty=float(params.frequency_penalty),
            processors=tuple(map(self._processor, params.logits_processors or ())),
        )
        return None if controls == NO_CONTROLS else controls

    def _processor(self, name: str) -> int:
        if name not in self._processors:
            known = ", ".join(self._processors) or "none"
            raise RequestError(f"logits_processors holds {name!r}; the LLM was given: {known}")
        return self._processors[name]

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """As vLLM: each word at the start of a text and, where that is another token, after a space."""
        if words and self._tokenizer is None:
            raise RequestError("bad_words need a tokenizer, and the model folder has none")
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            plain, spaced = (self._word(prefix + word.lstrip()) for prefix in ("", " "))
            found[plain] = None
            if spaced[:1] != plain[:1] and len(spaced) == len(plain):
                found[spaced] = None
        return tuple(word for word in found if word)

    def _word(self, text: str) -> tuple[int, ...]:
        assert self._tokenizer is not None, "bad words were checked"
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        self._check_token_ids(token_ids)
        return tuple(token_ids)

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        if isinstance(prompt, Mapping):
            if prompt.get("prompt_token_ids"):
                self._check_token_ids(prompt["prompt_token_ids"])
                return prompt.get("prompt"), list(prompt["prompt_token_ids"])
            prompt = prompt.get("prompt") or ""
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty; it must have at least one token")
            if self._tokenizer is None:
                raise RequestError(
                    "the model folder has no tokenizer.json, tokenizer.model or qwen.tiktoken; "
                    "give the prompt as token ids"
                )
            return prompt, self._encode(prompt, self._tokenizer)
        if not isinstance(prompt, Sequence):
            raise RequestError(
                f"a prompt is a {type(prompt).__name__}; it must be text or a list of token ids"
            )
        self._check_token_ids(prompt)
        return None, list(prompt)  # type: ignore[arg-type]

    def _encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """A tokenizer may have more tokens than the model has rows: those cannot be used."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the prompt is no Unicode text: {error}") from error
        token_ids = tokenizer.encode(text)
        self._check_token_ids(token_ids)
        return token_ids

    def _check_token_ids(self, prompt: Sequence[Any]) -> None:
        """All at once where nothing is wrong: a loop over a long prompt would delay its first token."""
        if set(map(type, prompt)) == {int} and min(prompt) >= 0 and max(prompt) < self._vocab_size:
            return
        for token_id in prompt:
            self._check_token_id("the prompt", token_id)

    def _check_token_id(self, where: str, token_id: object) -> None:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise RequestError(f"{where} holds {token_id!r}; token ids are integers")
        if not 0 <= token_id < self._vocab_size:
            raise RequestError(
                f"{where} holds token id {token_id}; the vocabulary is 0 … {self._vocab_size - 1}"
            )

    def _check_length(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise RequestError("the prompt is empty; it must have at least one token")
        if len(token_ids) >= self._max_model_len:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens; max_model_len is {self._max_model_len} and at "
                "least one token is generated: shorten the prompt or raise max_model_len"
            )
