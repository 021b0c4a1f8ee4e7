"""What every kind of tokenizer can do, and what they share: finding special tokens in a text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """special_tokens: text → id of each token that skip_special_tokens leaves out of a text.
    stop_token_ids: what ends the family's answers although no file of the folder says so.
    """

    special_tokens: Mapping[str, int]
    stop_token_ids: frozenset[int]

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Special tokens that the text spells count as such. add_special_tokens: what the model expects
        around a text, a bos at the start for most.
        """
        ...

    def encode_plain(self, text: str) -> list[int]:
        """Text and nothing else: what spells a special token is letters, and nothing is added."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Ids without a token (rows that only pad the embedding) are left out. Bytes that are no UTF-8
        become U+FFFD.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What this token writes inside a text; nothing for special tokens and ids without a token.

        Raises RequestError where a text is more than what its tokens write, one after the other.
        """
        ...


class TokenSplitter:
    """Cuts a text at the tokens in it that are spelled out; the longest wins where several begin."""

    def __init__(self, tokens: Iterable[str]) -> None:
        longest_first = sorted(tokens, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None

    def split(self, text: str) -> Iterator[tuple[bool, str]]:
        """(is a token, text) from left to right, without empty texts."""
        parts = self._pattern.split(text) if self._pattern else [text]
        for index, part in enumerate(parts):
            if part:
                yield index % 2 == 1, part
