"""Guides: which tokens may come next so that an answer keeps its structure, by the llguidance library.

Rank 0 only. A mask is computed in a thread as soon as its row's newest token is known, while the device works
on other rows; the scheduler asks for it when it plans the row's next token. Knows no tensor.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distllm.engine.tokenizers import Tokenizer
from distllm.engine.tokenizers.library import LibraryTokenizer
from distllm.errors import RequestError
from distllm.runtime.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

NUM_THREADS = 8
WHITESPACE = r"[ \n\r\t]{0,24}"  # in a place: a new line and its indentation
ANY_OBJECT = '{"type": "object"}'


class Guide:
    """Of one sequence. Every token that it gets must be one of its last mask's."""

    def __init__(self, matcher: LLMatcher, pool: ThreadPoolExecutor) -> None:
        self._matcher, self._pool = matcher, pool
        self._mask: Future[bytes] = pool.submit(matcher.compute_bitmask)

    def copy(self) -> Guide:
        """For another sequence, at the same place."""
        self._mask.result()
        return Guide(self._matcher.deep_copy(), self._pool)

    def mask(self) -> bytes:
        """A bit for each token, lowest bit first, in whole 32-bit words. Waits until it is computed."""
        return self._mask.result()

    def advance(self, token_id: int) -> bool:
        """Take the token in; False if the grammar got too complex for the library's limits."""
        if not self._matcher.consume_token(token_id):
            return False
        self._mask = self._pool.submit(self._matcher.compute_bitmask)
        return True


class Guides:
    """Makes them for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._eos = eos_token_ids

    def make(self, params: StructuredOutputsParams) -> Guide:
        """Raises RequestError for what the library cannot read or finds too complex."""
        from llguidance import LLMatcher, LLParserLimits

        # The library's own limits: some 20 ms for a grammar, 15 for a token. Beyond, it says so.
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, self._grammar(params), log_level=0, limits=limits)
        if matcher.is_error():
            raise RequestError(f"structured_outputs: {one_line(matcher.get_error())}")
        return Guide(matcher, self._pool)

    def _grammar(self, params: StructuredOutputsParams) -> str:
        from llguidance import LLMatcher
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            if params.regex is not None:
                return str(LLMatcher.grammar_from_regex(params.regex))
            if params.choice is not None:
                alternatives = " | ".join(map(json.dumps, params.choice))
                return str(LLMatcher.grammar_from_lark(f"start: {alternatives}"))
            if params.grammar is not None:
                is_ebnf = "::=" in params.grammar
                lark = gbnf_to_lark(params.grammar) if is_ebnf else params.grammar
                return str(LLMatcher.grammar_from_lark(lark))
            schema = ANY_OBJECT if params.json_object else params.schema
            return str(LLMatcher.grammar_from_json_schema(schema, overrides=json_options(params)))
        except ValueError as error:
            raise RequestError(f"structured_outputs: {one_line(str(error))}") from None

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if not isinstance(self._source, LibraryTokenizer):
            raise RequestError("structured_outputs need a tokenizer.json, and the model folder has none")
        if not self._eos:
            raise RequestError("structured_outputs need an end-of-sequence token; the folder names none")
        return LLTokenizer(self._source.to_json(), n_vocab=self._vocab_size, eos_token=list(self._eos))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="guides")


def json_options(params: StructuredOutputsParams) -> JsonCompileOptions:
    """Whitespace without end is how small models fill max_tokens."""
    if params.disable_any_whitespace:
        return {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}


def one_line(text: Any) -> str:
    return " ".join(str(text).split())[:500]
