"""Ranks in tiktoken's format, a base64 token and its rank on each line (Qwen, GLM-4), through that library.

The library is given ranks and pattern; it loads nothing itself.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from distllm.engine.tokenizers.families import QWEN, TokenizerFamily
from distllm.engine.tokenizers.settings import TokenizerSettings
from distllm.errors import CheckpointError

LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d{1,7}\r?")
MAX_RANKS = 2**20


def looks_like_ranks(data: bytes) -> bool:
    """By the first line: file names do not tell."""
    return LINE.fullmatch(data[:4096].split(b"\n", 1)[0]) is not None


def read_ranks(path: Path, data: bytes) -> dict[bytes, int]:
    """Ranks 0 … n-1, every single byte among them. Raises CheckpointError for anything else."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        if not LINE.fullmatch(line) or number > MAX_RANKS:
            raise CheckpointError(f"{path}: line {number} is no token and rank")
        token, rank = line.split()
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except binascii.Error as error:
            raise CheckpointError(f"{path}: line {number} is no base64: {error}") from error
    if set(ranks.values()) != set(range(len(ranks))):
        raise CheckpointError(f"{path}: its {len(ranks)} ranks are not 0 … {len(ranks) - 1}, each once")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise CheckpointError(f"{path}: a byte has no rank, so some texts could not be written")
    return ranks


class RankTokenizer:
    def __init__(self, path: Path, data: bytes, settings: TokenizerSettings, family: TokenizerFamily) -> None:
        from tiktoken import Encoding

        family = QWEN if path.name == "qwen.tiktoken" else family
        if not family.pattern:
            raise CheckpointError(
                f"{path} holds ranks, which say nothing of words; tokenizer_class "
                f"{settings.tokenizer_class!r} is unknown: give a tokenizer.json"
            )
        ranks = read_ranks(path, data)
        added = {text: number for text, number in settings.added_tokens.items() if number >= len(ranks)}
        appended = {text: len(ranks) + at for at, text in enumerate(family.appended)}
        self._encoding = Encoding(
            family.name, pat_str=family.pattern, mergeable_ranks=ranks, special_tokens=appended | added
        )
        self.special_tokens: Mapping[str, int] = appended | {
            text: n for text, n in added.items() if text in settings.special
        }
        self.stop_token_ids = frozenset(self.special_tokens[name] for name in family.stops)
        self._special_ids = frozenset(self.special_tokens.values())
        self._known = frozenset([*ranks.values(), *appended.values(), *added.values()])
        self._prefix = [self.special_tokens[name] for name in family.prefix]
        self._normal_form = family.normal_form

    @property
    def vocab_size(self) -> int:
        return 1 + max(self._known)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = self._encoding.encode(self._normalize(text), allowed_special="all")
        return [*self._prefix, *ids] if add_special_tokens else ids

    def encode_plain(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(self._normalize(text))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        left_out = self._special_ids if skip_special_tokens else frozenset()
        wanted = [number for number in token_ids if number in self._known and number not in left_out]
        return self._encoding.decode_bytes(wanted).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._special_ids or token_id not in self._known:
            return b""
        return self._encoding.decode_single_token_bytes(token_id)

    def _normalize(self, text: str) -> str:
        return unicodedata.normalize(self._normal_form, text) if self._normal_form else text  # type: ignore[arg-type]
