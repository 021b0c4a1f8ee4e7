"""BeamSearchParams: how far and how wide one prompt is searched. Names as in vLLM; early_stopping and
the groups as in transformers (these up to its version 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from reprlib import repr as shorten
from typing import Literal

from distllm.errors import RequestError
from distllm.runtime.bounds import MAX_INT, check_bool, check_float, check_int

MAX_BEAM_WIDTH = 32
MAX_LENGTH_PENALTY = 10.0
MAX_DIVERSITY_PENALTY = 1e6  # more than any log-probability: a token is not taken twice


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Checked when made; raises RequestError with the field, the value and the limit."""

    beam_width: int
    max_tokens: int
    n: int | None = None  # the best sequences to return; None: beam_width of them
    length_penalty: float = 1.0  # score = cumulative log-probability / generated tokens ** length_penalty
    # When as many sequences have finished as there are beams, stop: True at once, False if the best that runs
    # would not make it with its present length, "never" only if it could not with any length.
    early_stopping: bool | Literal["never"] = False
    ignore_eos: bool = False  # go on after the end-of-sequence token
    # Diverse beam search: so many searches, each with its part of the beams, its finished sequences and its
    # end. At each step a token costs a beam of theirs diversity_penalty for every beam of the groups before
    # that takes it. That counts in the score; the best n of all groups are returned.
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0

    def __post_init__(self) -> None:
        check_int("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH)
        check_int("max_tokens", self.max_tokens, 1, MAX_INT)
        if self.n is not None:
            check_int("n", self.n, 1, self.beam_width)
        check_float("length_penalty", self.length_penalty, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)
        if self.early_stopping != "never" and not isinstance(self.early_stopping, bool):
            raise RequestError(
                f'early_stopping is {shorten(self.early_stopping)}; it must be True, False or "never"'
            )
        check_bool("ignore_eos", self.ignore_eos)
        self._check_groups()

    def _check_groups(self) -> None:
        check_int("num_beam_groups", self.num_beam_groups, 1, self.beam_width)
        if self.beam_width % self.num_beam_groups:
            raise RequestError(
                f"num_beam_groups is {self.num_beam_groups}; it must divide beam_width ({self.beam_width})"
            )
        check_float("diversity_penalty", self.diversity_penalty, 0.0, MAX_DIVERSITY_PENALTY)
        if self.diversity_penalty and self.num_beam_groups == 1:
            raise RequestError(
                f"diversity_penalty is {self.diversity_penalty}; with one group of beams it must be 0: "
                "raise num_beam_groups"
            )

    @property
    def group_size(self) -> int:
        """The beams of each group."""
        return self.beam_width // self.num_beam_groups
