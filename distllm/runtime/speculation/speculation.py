"""Speculation: which requests get drafts in a step, and what became of them. Rank 0 only.

The scheduler asks; a Proposer guesses; the switch says whether it pays. Knows no tensor and no block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distllm.runtime.request import Request
from distllm.runtime.speculation.proposer import Proposer
from distllm.runtime.speculation.switch import SpeculationSwitch


@dataclass
class SpeculationStats:
    """Since the LLM was made."""

    num_verifications: int = 0  # rows of steps: drafts of one request that were verified together
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Of drafted tokens; 0 where there were none."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Of a row that verifies: the drafts that were right, and the token behind them."""
        return 1 + self.num_accepted_tokens / self.num_verifications if self.num_verifications else 1.0


class Speculation:
    def __init__(
        self, proposer: Proposer, num_tokens: int, switch: SpeculationSwitch, together: bool = False
    ) -> None:
        """num_tokens: drafts of a request in a step at most. together: no request is verified while others
        are: without a pipeline two verifications take twice as long as one of all.
        """
        self.stats = SpeculationStats()
        self.switch = switch
        self._proposer = proposer
        self._num_tokens = num_tokens
        self._together = together
        self._num_verifying = 0  # requests
        self._pays = True

    def choose(self, requests: list[Request], num_rows: int) -> list[Request]:
        """Of requests that could decode now, those that may: where it is worth while to speculate, a request
        waits until all its tokens are known. num_rows: that decode at present.
        """
        self._pays = self.switch.decide(num_rows)
        if not self._pays:
            return requests
        waits = self._together and self._num_verifying
        return [r for r in requests if r.drafting is None or (r.is_known and not waits)]

    def num_wanted(self, request: Request) -> int:
        """How many drafts the request should get. So few that even if all are right it does not end: an end
        by length is foreseen by counting.
        """
        if not self._pays or request.drafting is None or not request.is_known:
            return 0
        room = request.max_total_tokens - len(request.token_ids) - 2
        return max(0, min(self._num_tokens, request.drafting.limit, room))

    def propose(
        self, wanted: Mapping[Request, int], masks: dict[int, bytes]
    ) -> dict[Request, tuple[int, ...]]:
        """Drafts for those that get some. What grammars forbid is left out; masks, as StepPlan.token_masks,
        get one for each place of those that have a grammar.
        """
        drafts: dict[Request, tuple[int, ...]] = {}
        guesses = self._proposer.propose(wanted) if wanted else []
        for request, guess in zip(wanted, guesses, strict=True):
            token_ids = tuple(guess)
            if token_ids and request.constraint is not None:
                token_ids, masks[request.slot] = request.constraint.look_ahead(token_ids)
            if token_ids:
                drafts[request] = token_ids
        self._num_verifying += len(drafts)
        return drafts

    def end(self, request: Request) -> bool:
        """The results of a verification have come. Whether a draft was wrong."""
        drafting = request.drafting
        assert drafting is not None, "nothing was drafted"
        num_drafts, num_right = len(drafting.token_ids), drafting.num_right
        self._num_verifying -= 1
        self.stats.num_verifications += 1
        self.stats.num_draft_tokens += num_drafts
        self.stats.num_accepted_tokens += num_right
        drafting.end()
        return num_right < num_drafts
