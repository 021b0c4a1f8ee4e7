"""GroupSearch: of one group of beams, which continuations go on and which have finished, exactly as
transformers' beam search decides. Plain arithmetic; knows no other group, no request, no block and no tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import islice
from typing import NamedTuple

from distllm.runtime.beams.beam_search_params import BeamSearchParams
from distllm.runtime.plan import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Beam:
    """A sequence that may go on."""

    token_ids: list[int]  # generated
    cum_logprob: float
    penalized: float  # cum_logprob less all diversity penalties: what a search compares


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A sequence that has ended."""

    token_ids: list[int]  # generated, the end-of-sequence token included
    cum_logprob: float
    score: float  # see BeamSearchParams
    finish_reason: str  # "stop" or "length"


class Child(NamedTuple):
    """What a row holds from now on: the tokens of row `parent`, and one more."""

    penalized: float  # as Beam's. First: the order of children is by this
    parent: int
    token_id: int
    cum_logprob: float


class GroupSearch:
    """Begins with one row, the prompt; from the first advance() on it has group_size rows."""

    def __init__(self, params: BeamSearchParams, max_tokens: int, eos_token_ids: Sequence[int]) -> None:
        """max_tokens: params.max_tokens, or fewer where the model's window ends before."""
        self._params = params
        self._max_tokens = max_tokens
        self._eos = frozenset(() if params.ignore_eos else eos_token_ids)
        # group_size of them go on, even if every beam could also end in every way
        self._num_candidates = (1 + len(self._eos)) * params.group_size
        self._beams = [Beam([], 0.0, 0.0)]
        self.has_ended = False
        self.hypotheses: list[Hypothesis] = []  # the best first, at most group_size; at the end all of these

    def advance(self, results: Sequence[TokenLogprobs], penalties: Mapping[int, float]) -> list[Child]:
        """One more token. results: of each row, the best, in order: group_size of them, and one more for
        every end-of-sequence token and every token that has a penalty.

        Returns the new content of every row, also if the search has ended with it. A row that goes on at all
        is its own first child's parent.
        """
        best = self._best(results, penalties)
        length = len(self._beams[0].token_ids) + 1
        is_last = length == self._max_tokens
        for child in best[: self._params.group_size]:
            if is_last or child.token_id in self._eos:
                self._finish(child)
        running = [child for child in best if child.token_id not in self._eos][: self._params.group_size]
        self.has_ended = is_last or self._is_settled(running[0].penalized, length)
        children = keep_places(running)
        self._beams = [Beam(self._tokens(child), child.cum_logprob, child.penalized) for child in children]
        return children

    def _best(self, results: Sequence[TokenLogprobs], penalties: Mapping[int, float]) -> list[Child]:
        """The best continuations of all rows, in order."""
        rows: Iterable[Iterable[Child]] = (self._extend(*entry, penalties) for entry in enumerate(results))
        if penalties:  # a row's order is another one now
            rows = (sorted(row, reverse=True) for row in rows)
        return list(islice(merge(*rows, reverse=True), self._num_candidates))

    def _extend(self, row: int, result: TokenLogprobs, penalties: Mapping[int, float]) -> Iterator[Child]:
        beam = self._beams[row]
        for token_id, logprob in zip(result.top_ids, result.top_logprobs, strict=True):
            penalized = beam.penalized + (logprob - penalties.get(token_id, 0.0))
            yield Child(penalized, row, token_id, beam.cum_logprob + logprob)

    def _tokens(self, child: Child) -> list[int]:
        return [*self._beams[child.parent].token_ids, child.token_id]

    def _score(self, penalized: float, length: int) -> float:
        return float(penalized / length**self._params.length_penalty)

    def _finish(self, child: Child) -> None:
        """Keep it, if it is among the group_size best that have ended."""
        tokens = self._tokens(child)
        reason = "stop" if child.token_id in self._eos else "length"
        score = self._score(child.penalized, len(tokens))
        self.hypotheses.append(Hypothesis(tokens, child.cum_logprob, score, reason))
        self.hypotheses.sort(key=lambda hypothesis: -hypothesis.score)
        del self.hypotheses[self._params.group_size :]

    def _is_settled(self, best_running: float, length: int) -> bool:
        """Whether no row is expected to end better than what has ended: see BeamSearchParams."""
        params = self._params
        if len(self.hypotheses) < params.group_size:
            return False
        if params.early_stopping is True or params.beam_width == 1:  # one beam is greedy, whatever the mode
            return True
        favours_long = params.early_stopping == "never" and params.length_penalty > 0
        reachable = self._score(best_running, self._max_tokens if favours_long else length)
        return reachable <= self.hypotheses[-1].score


def keep_places(children: Sequence[Child]) -> list[Child]:
    """The same, so ordered that each parent's first child stays in its row: the fewest rows move."""
    rows: dict[int, Child] = {}
    others = []
    for child in children:
        if child.parent in rows:
            others.append(child)
        else:
            rows[child.parent] = child
    free = [row for row in range(len(children)) if row not in rows]
    rows.update(zip(free, others, strict=True))
    return [rows[row] for row in range(len(children))]
