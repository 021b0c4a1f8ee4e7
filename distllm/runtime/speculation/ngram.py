"""Prompt lookup: what followed the last tokens when they stood in the text before is guessed to follow again.

Costs no model; pays where a text repeats itself or its prompt. Plain Python. Idea: prompt lookup decoding
(Saxena 2023), n-gram matching in LLMA (Yang et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from distllm.runtime.request import Request

MAX_LOOKS = 16  # earlier places that are compared


class NgramProposer:
    """min_ngram tokens must match; of the latest places the one with the longest match, up to max_ngram,
    counts.
    """

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        self._min, self._max = min_ngram, max_ngram
        self._places: WeakKeyDictionary[Request, _Places] = WeakKeyDictionary()

    def propose(self, wanted: Mapping[Request, int]) -> list[list[int]]:
        return [self._guess(request, count) for request, count in wanted.items()]

    def _guess(self, request: Request, count: int) -> list[int]:
        places = self._places.get(request)
        if places is None:
            places = self._places[request] = _Places(self._min)
        places.extend(request.token_ids)
        end = places.find(request.token_ids, self._max)
        return request.token_ids[end : end + count] if end else []


class _Places:
    """Where each n-gram of a growing text ended: the last time, and of each place the time before."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._last: dict[tuple[int, ...], int] = {}
        self._before: list[int] = [0] * size  # by end; 0: none
        self._num_seen = 0

    def extend(self, token_ids: list[int]) -> None:
        """Take in what is new: n-grams that end before the last one, which is to be looked up."""
        for end in range(max(self._num_seen, self._size), len(token_ids)):
            ngram = tuple(token_ids[end - self._size : end])
            self._before.append(self._last.get(ngram, 0))
            self._last[ngram] = end
        self._num_seen = max(self._num_seen, len(token_ids))

    def find(self, token_ids: list[int], longest: int) -> int:
        """Where the best earlier occurrence of the text's last tokens ends; 0 if there is none."""
        best, best_length = 0, 0
        end = self._last.get(tuple(token_ids[-self._size :]), 0) if len(token_ids) >= self._size else 0
        for _ in range(MAX_LOOKS):
            if not end or best_length == longest:
                break
            length = self._size
            while length < min(longest, end) and token_ids[end - length - 1] == token_ids[-length - 1]:
                length += 1
            if length > best_length:
                best, best_length = end, length
            end = self._before[end]
        return best
