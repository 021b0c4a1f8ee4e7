"""Token ids to text, one token at a time: never half a character, never past a stop string. Knows no
request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 sequence decodes to
CONTEXT_TOKENS = 6  # of the prompt, so that the first token's leading space is decoded as inside a text
MAX_CONTEXT_TOKENS = 64


class Decoder(Protocol):
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """Text grows by whole characters: a token that ends inside a character waits for the next one.

        token_ids:  ... | prefix_offset ... read_offset | new
    text of [prefix_offset, read_offset) has been given out; it is decoded again with the new tokens, because
    a token's text can depend on the tokens before it.
    """

    def __init__(self, decoder: Decoder, prompt: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._ids = self._context(prompt)
        self._prefix_offset = 0
        self._read_offset = len(self._ids)

    def add(self, token_id: int) -> str:
        """The text that this token completes, perhaps empty."""
        self._ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        # Decoders drop blanks at the start of a text. A window that began with nothing else would hide them.
        if _is_anchor(self._decode(self._ids[self._read_offset :])):
            self._prefix_offset = self._read_offset
        self._read_offset = len(self._ids)
        return text

    def flush(self) -> str:
        """What is left at the end, an unfinished character included."""
        text = self._new_text()
        self._prefix_offset = self._read_offset = len(self._ids)
        return text

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The prompt's last tokens: as many as it takes to begin with a whole character."""
        for num_tokens in range(CONTEXT_TOKENS, min(len(prompt), MAX_CONTEXT_TOKENS)):
            if _is_anchor(self._decode(prompt[-num_tokens:])):
                return list(prompt[-num_tokens:])
        return list(prompt[-MAX_CONTEXT_TOKENS:])

    def _new_text(self) -> str:
        known = self._decode(self._ids[self._prefix_offset : self._read_offset])
        text = self._decode(self._ids[self._prefix_offset :])
        # Bytes that turn out to be no UTF-8 can take the characters before them along, but those are given
        # out.
        return text[len(known) :] if text.startswith(known) else self._decode(self._ids[self._read_offset :])

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


def _is_anchor(text: str) -> bool:
    """Does a decoded text not depend on what stood before it?"""
    return not text.isspace() and text != "" and not text.startswith(REPLACEMENT)


class StopStrings:
    """Finds the first stop string in a growing text and says how much of the text is safe to give out."""

    def __init__(self, stops: Sequence[str], include_in_output: bool) -> None:
        self._stops = stops
        self._include = include_in_output
        self._longest = max(map(len, stops), default=0)

    def find(self, text: str, num_new: int) -> tuple[str, int] | None:
        """(stop string, length to cut the text to) if one ends within the last num_new characters of text."""
        start = max(0, len(text) - num_new - self._longest + 1)
        found = [(text.find(stop, start), stop) for stop in self._stops]
        hits = sorted((at, -len(stop), stop) for at, stop in found if at >= 0)
        if not hits:
            return None
        at, _, stop = hits[0]
        return stop, at + len(stop) if self._include else at

    def num_safe(self, text: str) -> int:
        """Length of text that no stop string can still begin in."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
