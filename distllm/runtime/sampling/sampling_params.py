"""SamplingParams: how one prompt is to be continued. Field names and meanings as in vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as shorten
from typing import Any

from distllm.errors import CheckpointError, RequestError
from distllm.runtime.bounds import (
    MAX_INT,
    check_above_zero,
    check_bool,
    check_float,
    check_int,
    check_list,
    check_text,
)
from distllm.runtime.structured.structured_outputs import StructuredOutputsParams

MAX_N = 64
MAX_TEMPERATURE = 100.0
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_ALLOWED_TOKEN_IDS = 2**18
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
MAX_NGRAM = 1024
MAX_PROCESSORS = 16

SWITCHES = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize", "speculate")

# Of a generation_config.json; the others are no defaults in vLLM either.
GENERATION_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Checked when made; raises RequestError with the field, the value and the limit."""

    n: int = 1  # sequences per prompt, sharing the prompt's KV blocks
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 or -1: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0  # of tokens in the output
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # of tokens in prompt and output
    logit_bias: Mapping[int, float] | None = None  # token id → added to its logit
    allowed_token_ids: Sequence[int] | None = None  # nothing else is sampled
    bad_words: Sequence[str] | None = None  # never sampled, whatever their tokens
    no_repeat_ngram_size: int = 0  # so many tokens never come twice in the same order, the prompt included
    logits_processors: Sequence[str] | None = None  # names of the LLM's, in the order of application
    structured_outputs: StructuredOutputsParams | None = None  # the form that the text must have
    seed: int | None = None  # None: drawn from the engine's seed
    max_tokens: int | None = 16  # None: until max_model_len
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None  # k best at each position, and the sampled token's
    prompt_logprobs: int | None = None  # the same at each position of the prompt
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True
    speculate: bool = True  # where the LLM has a speculative_config; the tokens are the same without

    def __post_init__(self) -> None:
        check_int("n", self.n, 1, MAX_N)
        check_float("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        check_int("top_k", self.top_k, -1, MAX_INT)
        check_float("top_p", self.top_p, 0.0, 1.0)
        check_above_zero("top_p", self.top_p, "for greedy, set temperature=0")
        check_float("min_p", self.min_p, 0.0, 1.0)
        check_float("typical_p", self.typical_p, 0.0, 1.0)
        check_above_zero("typical_p", self.typical_p, "1 keeps all")
        self._check_controls()
        if self.seed is not None:
            check_int("seed", self.seed, -(2**63), 2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        for name in SWITCHES:
            check_bool(name, getattr(self, name))
        self._check_lengths()
        self._check_stops()
        self._check_form()

    def _check_controls(self) -> None:
        check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0)
        check_above_zero("repetition_penalty", self.repetition_penalty, "1 is none")
        check_int("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, MAX_NGRAM)
        self._check_bias()
        if self.allowed_token_ids is not None:
            check_list("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS)
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids is empty; it must have an entry, or be None for all")
        for name, limit in (("bad_words", MAX_BAD_WORDS), ("logits_processors", MAX_PROCESSORS)):
            texts = getattr(self, name)
            if texts is not None:
                check_list(name, texts, limit)
                for index, text in enumerate(texts):
                    check_text(f"{name}[{index}]", text, MAX_BAD_WORD_CHARS)

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias is {shorten(self.logit_bias)}; it must be a dict")
        if len(self.logit_bias) > MAX_BIASES:
            raise RequestError(
                f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_BIASES} are allowed"
            )
        for token_id, value in self.logit_bias.items():
            check_int("a token id of logit_bias", token_id, 0, MAX_INT)
            check_float(f"logit_bias[{token_id}]", value, -MAX_BIAS, MAX_BIAS)

    def _check_lengths(self) -> None:
        check_int("min_tokens", self.min_tokens, 0, MAX_INT)
        if self.max_tokens is None:
            return
        check_int("max_tokens", self.max_tokens, 1, MAX_INT)
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}; it must be at most max_tokens, {self.max_tokens}"
            )

    def _check_stops(self) -> None:
        if self.stop_token_ids is not None:
            check_list("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
            for index, token_id in enumerate(self.stop_token_ids):
                check_int(f"stop_token_ids[{index}]", token_id, 0, MAX_INT)
        if self.stop is not None and not isinstance(self.stop, str):
            check_list("stop", self.stop, MAX_STOPS)
        for index, text in enumerate(self.stop_strings):
            check_text(f"stop[{index}]", text, MAX_STOP_CHARS)
        if self.stop_strings and not self.detokenize:
            raise RequestError("stop needs detokenize=True; it is False: set it or use stop_token_ids")

    def _check_form(self) -> None:
        form = self.structured_outputs
        if form is not None and not isinstance(form, StructuredOutputsParams):
            raise RequestError(f"structured_outputs is {shorten(form)}; it must be a StructuredOutputsParams")
        if form is not None and self.ignore_eos:
            raise RequestError("ignore_eos is True; structured_outputs end with eos: leave one of them out")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def default_sampling_params(generation_config: Mapping[str, Any]) -> SamplingParams:
    """What the model's authors recommend, and the library's defaults for what they leave open.

    Raises CheckpointError, naming the field, for a value that is no such parameter.
    """
    given = {
        field: generation_config[name]
        for name, field in GENERATION_FIELDS.items()
        if generation_config.get(name) is not None
    }
    try:
        return SamplingParams(**given)
    except RequestError as error:
        raise CheckpointError(
            f"generation_config.json: {error}; mend it or set generation_config='vllm'"
        ) from None
