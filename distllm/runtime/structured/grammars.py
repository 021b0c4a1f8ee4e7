"""Grammars: from StructuredOutputsParams to Constraints, by the llguidance library.

A grammar is tried in a process of its own and then compiled on a thread of its own; what is wrong with it, or
that it is too costly, is the RequestError of the request that brought it. Equal grammars are tried once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from queue import Empty, SimpleQueue
from threading import Thread, stack_size
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

from distllm.engine.tokenizers import Tokenizer
from distllm.errors import RequestError
from distllm.runtime.structured.constraint import NUM_THREADS, Constraint
from distllm.runtime.structured.grammar_trial import (
    STACK_BYTES,
    GrammarTrial,
    make_grammar,
    one_line,
    parser_limits,
)
from distllm.runtime.structured.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

COMPILE_TIMEOUT_S = 5.0
Made = TypeVar("Made")

MAX_CACHED = 64  # compiled grammars
CHEAP_S = 0.05  # to compile: once for each thread
# Tokens that a mask takes or leaves together, where a grammar allows any of them: words. No longer ones: what
# the library does to see that all are allowed is bounded.
WORDS = ("[a-z]{1,8}", " [a-z]{1,8}", "[a-zA-Z]{1,8}", " [a-zA-Z]{1,8}")


class Grammars:
    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """vocab_size: the model's, which may have more or fewer rows than the tokenizer has tokens."""
        self._given, self._vocab_size, self._eos = tokenizer, vocab_size, list(eos_token_ids)
        self._trial = GrammarTrial()
        self._compiled = lru_cache(MAX_CACHED)(self._try_and_compile)

    def start(self) -> None:
        """Get ready for the first grammar, in the background; without, that one waits. Until close()."""
        if self._given is not None:
            with suppress(OSError):  # the first grammar says why it cannot be; who has none needs no process
                self._trial.start()

    def close(self) -> None:
        self._trial.close()

    def constraints(
        self, params: StructuredOutputsParams, count: int, min_tokens: int, stop_token_ids: Sequence[int]
    ) -> list[Constraint]:
        """One for each of count sequences. Raises RequestError, in one line, for a grammar that is wrong or
        too costly.
        """
        if self._given is None:
            raise RequestError("structured_outputs need a tokenizer, and the model folder has none")
        if not self._eos:
            raise RequestError("structured_outputs need an end-of-sequence token, and the model names none")
        compiled = self._compiled(*params.source)
        made = [compiled.copy() for _ in range(count)]
        return [
            Constraint(matcher, self._vocab_size, lineage, min_tokens, stop_token_ids)
            for matcher, lineage in made
        ]

    def _try_and_compile(self, field: str, source: str) -> _Compiled:
        error = self._trial.check(field, source)
        if error:
            raise _refusal(field, error)
        _within(COMPILE_TIMEOUT_S, field, lambda: self._tokenizer)  # once; no grammar's own cost
        return _Compiled(lambda: self._compile(field, source))

    def _compile(self, field: str, source: str) -> LLMatcher:
        """With its first mask: copies find that work done, and what fails at once is refused."""

        def work() -> LLMatcher:
            from llguidance import LLMatcher

            grammar = make_grammar(field, source)
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=parser_limits())
            matcher.compute_bitmask()
            if matcher.is_error():
                raise _refusal(field, one_line(matcher.get_error()))
            return matcher

        return _within(COMPILE_TIMEOUT_S, field, work)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        assert self._given is not None, "checked before"
        vocabulary = _Vocabulary(self._given, self._vocab_size, self._eos)
        slices = [*WORDS, *LLTokenizer.general_slices()]
        made = LLTokenizer(vocabulary, eos_token=self._eos, slices=slices)  # type: ignore[arg-type]
        vocabulary.greedy = made.greedy_tokenize
        return made


class _Compiled:
    """A grammar as matchers to be copied: one for each thread that finds masks, since a matcher and its
    copies share a lock; one for all where compiling takes long.
    """

    def __init__(self, compile: Callable[[], LLMatcher]) -> None:
        start = perf_counter()
        self._compile, self._matchers = compile, [compile()]
        self._num_lineages = NUM_THREADS if perf_counter() - start < CHEAP_S else 1
        self._num_copies = 0

    def copy(self) -> tuple[LLMatcher, int]:
        """A matcher of its own for one more sequence, and its lineage."""
        lineage = self._num_copies % self._num_lineages
        self._num_copies += 1
        if lineage == len(self._matchers):
            self._matchers.append(self._compile())
        return self._matchers[lineage].deep_copy(), lineage


class _Vocabulary:
    """What the library asks of a tokenizer; one for all kinds."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: Sequence[int]) -> None:
        self.eos_token_id = eos[0]
        self._tokenizer = tokenizer
        self._written = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        special = {n: text.encode() for text, n in tokenizer.special_tokens.items() if n < vocab_size}
        special |= {n: special.get(n) or self._written[n] or b"<|end|>" for n in eos}
        self.special_token_ids = sorted(special)
        self.tokens = [special.get(n, text) for n, text in enumerate(self._written)]
        self.greedy: Callable[[str], list[int]] = lambda text: []

    def __call__(self, text: str) -> list[int]:
        """As the model was trained to read it where these tokens write the text alone, no blank before it:
        where a grammar leaves one text only, these are all that is allowed.
        """
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        written = b"".join(self._written[n] for n in token_ids if n < len(self._written))
        return token_ids if written == text.encode() else self.greedy(text)


def _refusal(field: str, reason: str) -> RequestError:
    return RequestError(f"structured_outputs.{field} cannot be used: {reason}")


def _within(timeout_s: float, field: str, work: Callable[[], Made]) -> Made:
    """work() on another thread, which has more stack than the trial had. One that takes too long, which the
    trial makes unlikely, is left to itself.
    """
    results: SimpleQueue[Made | Exception] = SimpleQueue()

    def run() -> None:
        try:
            results.put(work())
        except Exception as error:  # raised below
            results.put(error)

    before = stack_size(4 * STACK_BYTES)
    try:
        Thread(target=run, name="grammar", daemon=True).start()
    finally:
        stack_size(before)
    try:
        result = results.get(timeout=timeout_s)
    except Empty:
        reason = f"it took longer than {timeout_s:.0f} s to compile; write a smaller one"
        raise _refusal(field, reason) from None
    if isinstance(result, Exception):
        raise result
    return result
