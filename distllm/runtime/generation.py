"""Generation: one prompt and its n samples on rank 0, from sampled ids to text and outputs.

Owns detokenising, stop strings and what has been given out already. Knows no scheduler and no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from distllm.engine.tokenizers import Tokenizer
from distllm.runtime.detokenizer import Detokenizer, StopStrings
from distllm.runtime.outputs import CompletionOutput, Logprob, RequestOutput
from distllm.runtime.plan import TokenLogprobs
from distllm.runtime.request import Request
from distllm.runtime.sampling.sampling_params import SamplingParams


@dataclass(slots=True)
class _Sample:
    """One continuation: its text so far, and how much of it stream() has given out."""

    request: Request
    detokenizer: Detokenizer | None
    text: str = ""
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    num_given_chars: int = 0
    num_given_tokens: int = 0
    gave_end: bool = False


class Generation:
    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        params: SamplingParams,
        requests: list[Request],
        tokenizer: Tokenizer | None,
    ) -> None:
        self.request_id = request_id
        self.requests = requests
        self._prompt = prompt
        self._params = params
        self._tokenizer = tokenizer
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if params.prompt_logprobs is not None:
            self._prompt_logprobs = [None] * requests[0].num_prompt_tokens
        self._stops = StopStrings(params.stop_strings, params.include_stop_str_in_output)
        self._samples = [_Sample(request, self._detokenizer(request)) for request in requests]

    @property
    def finished(self) -> bool:
        return all(request.finish_reason is not None for request in self.requests)

    def add_token(self, request: Request, token_id: int, logprobs: TokenLogprobs | None) -> str | None:
        """Take one more token of a sample into its text; return the stop string that it completes, if any."""
        sample = self._samples[request.index]
        if logprobs is not None:
            sample.logprobs.append(self._logprob_dict(token_id, logprobs))
            sample.cumulative_logprob += logprobs.logprob
        if sample.detokenizer is None:
            return None
        num_new = self._grow_text(sample, sample.detokenizer, token_id)
        if num_new == 0 or request.num_output_tokens < self._params.min_tokens:
            return None
        found = self._stops.find(sample.text, num_new)
        if found is None:
            return None
        stop, length = found
        sample.text = sample.text[:length]
        return stop

    def add_prompt_logprobs(self, start: int, logprobs: list[TokenLogprobs]) -> None:
        """Of the prompt's tokens from start on. After a preemption they come again."""
        assert self._prompt_logprobs is not None, "nobody asked for them"
        token_ids, num_top = self.requests[0].prompt_token_ids, self._params.prompt_logprobs
        for position, values in enumerate(logprobs, start):
            entry = self._logprob_dict(token_ids[position], values.limited(num_top or 0))
            self._prompt_logprobs[position] = entry

    def output(self) -> RequestOutput:
        """Everything so far."""
        return self._request_output([self._completion(sample, 0, 0) for sample in self._samples])

    def increment(self) -> RequestOutput | None:
        """What is new since the last call and safe to give out; None if nothing."""
        fresh = [sample for sample in self._samples if self._has_news(sample)]
        outputs = [self._completion(s, s.num_given_chars, s.num_given_tokens) for s in fresh]
        for sample, output in zip(fresh, outputs, strict=True):
            sample.num_given_chars += len(output.text)
            sample.num_given_tokens += len(output.token_ids)
            sample.gave_end = output.finish_reason is not None
        return self._request_output(outputs) if outputs else None

    def _detokenizer(self, request: Request) -> Detokenizer | None:
        if self._tokenizer is None or not self._params.detokenize:
            return None
        return Detokenizer(self._tokenizer, request.prompt_token_ids, self._params.skip_special_tokens)

    def _grow_text(self, sample: _Sample, detokenizer: Detokenizer, token_id: int) -> int:
        """Append the token's text; return by how many characters. A stop token has none, unless it is
        wanted.
        """
        reason = sample.request.finish_reason
        text = "" if reason == "stop" and not self._keeps_stop else detokenizer.add(token_id)
        if reason is not None:
            text += detokenizer.flush()
        sample.text += text
        return len(text)

    @property
    def _keeps_stop(self) -> bool:
        return self._params.include_stop_str_in_output

    def _has_news(self, sample: _Sample) -> bool:
        """New tokens, or an end without a token: an abort's."""
        request = sample.request
        ends = request.finish_reason is not None and not sample.gave_end
        return ends or sample.num_given_tokens < request.num_output_tokens

    def _completion(self, sample: _Sample, from_char: int, from_token: int) -> CompletionOutput:
        request = sample.request
        wants_logprobs = self._params.logprobs is not None
        end = len(sample.text) if request.finish_reason else self._stops.num_safe(sample.text)
        return CompletionOutput(
            index=request.index,
            text=sample.text[from_char:end],
            token_ids=request.token_ids[request.num_prompt_tokens + from_token :],
            cumulative_logprob=sample.cumulative_logprob if wants_logprobs else None,
            logprobs=sample.logprobs[from_token:] if wants_logprobs else None,
            finish_reason=request.finish_reason,
            stop_reason=self._stop_reason(request),
            num_draft_tokens=request.drafting.num_drafted if request.drafting else 0,
            num_accepted_tokens=request.drafting.num_accepted if request.drafting else 0,
        )

    def _stop_reason(self, request: Request) -> int | str | None:
        """The stop string or the user's stop token that ended the request; None for eos."""
        if request.stop_reason is not None or request.finish_reason != "stop":
            return request.stop_reason
        last = request.token_ids[-1]
        return last if last in (self._params.stop_token_ids or ()) else None

    def _request_output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        first = self.requests[0]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=list(first.prompt_token_ids),
            outputs=outputs,
            finished=self.finished,
            num_cached_tokens=first.num_cached_tokens,
            prompt_logprobs=self._prompt_logprobs,
        )

    def _logprob_dict(self, token_id: int, values: TokenLogprobs) -> dict[int, Logprob]:
        """The k best and the sampled token, which comes first, as in vLLM."""
        entries = {token_id: Logprob(values.logprob, values.rank, self._decode_one(token_id))}
        for rank, (top_id, logprob) in enumerate(
            zip(values.top_ids, values.top_logprobs, strict=True), start=1
        ):
            entries.setdefault(top_id, Logprob(logprob, rank, self._decode_one(top_id)))
        return entries

    def _decode_one(self, token_id: int) -> str | None:
        return self._tokenizer.decode([token_id], skip_special_tokens=False) if self._tokenizer else None
