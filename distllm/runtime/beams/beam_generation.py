"""BeamGeneration: one prompt's beam search on rank 0, from its parameters to its output.

Knows the search and the tokenizer; no scheduler and no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

from distllm.engine.tokenizers import Tokenizer
from distllm.runtime.beams.beam_rows import BeamRows
from distllm.runtime.beams.beam_search import BeamSearch, count_logprobs
from distllm.runtime.beams.beam_search_params import BeamSearchParams
from distllm.runtime.beams.group_search import Hypothesis
from distllm.runtime.outputs import BeamSearchOutput, BeamSearchSequence
from distllm.runtime.plan import RowSampling
from distllm.runtime.request import Request


class BeamGeneration:
    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: BeamSearchParams,
        max_tokens: int,
        eos_token_ids: Sequence[int],
        tokenizer: Tokenizer | None,
    ) -> None:
        """max_tokens: of params, or fewer where the model's window ends before."""
        self._prompt_token_ids = list(prompt_token_ids)
        self._params = params
        self._tokenizer = tokenizer
        self._search = BeamSearch(params, max_tokens, eos_token_ids)
        sampling = RowSampling(num_logprobs=count_logprobs(params, eos_token_ids))
        self.requests = [
            Request(f"{request_id}.{row}", tuple(prompt_token_ids), max_tokens, sampling, index=row)
            for row in range(params.beam_width)
        ]
        BeamRows(self.requests, self._search)

    def output(self) -> BeamSearchOutput:
        """The best sequences; after the search has ended."""
        return BeamSearchOutput(
            [self._sequence(found) for found in self._search.hypotheses[: self._params.n]]
        )

    def _sequence(self, found: Hypothesis) -> BeamSearchSequence:
        tokens = self._prompt_token_ids + found.token_ids
        text = self._tokenizer.decode(tokens, skip_special_tokens=True) if self._tokenizer else ""
        return BeamSearchSequence(tokens, found.cum_logprob, text, found.score, found.finish_reason)
