"""BeamSearchParams: how far and how wide one prompt is searched. Names as in vLLM, early_stopping as in
transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from reprlib import repr as shorten
from typing import Literal

from distllm.errors import RequestError
from distllm.runtime.bounds import MAX_INT, check_bool, check_float, check_int

MAX_BEAM_WIDTH = 32
MAX_LENGTH_PENALTY = 10.0


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Checked when made; raises RequestError with the field, the value and the limit."""

    beam_width: int
    max_tokens: int
    n: int | None = None  # the best sequences to return; None: beam_width of them
    length_penalty: float = 1.0  # score = cumulative log-probability / generated tokens ** length_penalty
    # When beam_width sequences have finished, stop: True at once, False if the best that runs would not make
    # it with its present length, "never" only if it could not with any length.
    early_stopping: bool | Literal["never"] = False
    ignore_eos: bool = False  # go on after the end-of-sequence token

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
