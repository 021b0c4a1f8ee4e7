"""BeamSearch: the search of one prompt's continuations, by groups of beams that are kept apart.

Every group searches by itself (GroupSearch); the tokens that one takes cost those after it more. This is
diverse beam search (Vijayakumar et al., 2016), as in transformers up to version 4. Knows no tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from distllm.runtime.beams.beam_search_params import BeamSearchParams
from distllm.runtime.beams.group_search import Child, GroupSearch, Hypothesis
from distllm.runtime.plan import TokenLogprobs


def count_logprobs(params: BeamSearchParams, eos_token_ids: Sequence[int]) -> int:
    """How many of its best continuations every row must give, so that none is missed: as many as its group
    has beams, as many as there are ways to end, and as many as the other groups can put a penalty on."""
    return params.beam_width + (0 if params.ignore_eos else len(eos_token_ids))


class BeamSearch:
    """Begins with one row, the prompt; from the first advance() on it has beam_width rows, group by group."""

    def __init__(self, params: BeamSearchParams, max_tokens: int, eos_token_ids: Sequence[int]) -> None:
        """max_tokens: params.max_tokens, or fewer where the model's window ends before."""
        self._params = params
        self._groups = [
            GroupSearch(params, max_tokens, eos_token_ids) for _group in range(params.num_beam_groups)
        ]

    @property
    def hypotheses(self) -> list[Hypothesis]:
        """What has ended, of all groups, the best first; beam_width of them at the end of the search."""
        found = [hypothesis for group in self._groups for hypothesis in group.hypotheses]
        return sorted(found, key=lambda hypothesis: -hypothesis.score)

    def advance(self, results: Sequence[TokenLogprobs]) -> list[Child] | None:
        """One more token. results: of each row, the count_logprobs() best, in order.

        Returns the new content of every row; a row that goes on at all is its own first child's parent. None
        when the search has ended.
        """
        taken: Counter[int] = Counter()  # by the groups so far; one that has ended takes nothing
        children: list[Child] = []
        for group in self._groups:
            first = len(children) if len(results) > 1 else 0  # all begin with the prompt's row
            own = results[first : first + self._params.group_size]
            if group.has_ended:
                found = stay(own)
            else:
                found = group.advance(own, self._penalties(taken))
                taken.update(child.token_id for child in found)
            children += [child._replace(parent=first + child.parent) for child in found]
        return None if all(group.has_ended for group in self._groups) else children

    def _penalties(self, taken: Counter[int]) -> dict[int, float]:
        return {token_id: self._params.diversity_penalty * count for token_id, count in taken.items()}


def stay(results: Sequence[TokenLogprobs]) -> list[Child]:
    """Rows that nobody looks at any more keep in step with the others, each by itself: no block is copied."""
    return [Child(0.0, row, result.top_ids[0], 0.0) for row, result in enumerate(results)]
