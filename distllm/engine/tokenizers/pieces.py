"""A bare SentencePiece model (old Llama, Gemma, Baichuan, ChatGLM), through the sentencepiece library.

Not converted to anything else: conversions differ where a text begins with blanks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from distllm.engine.tokenizers.base import TokenSplitter
from distllm.engine.tokenizers.families import TokenizerFamily
from distllm.engine.tokenizers.settings import TokenizerSettings
from distllm.errors import CheckpointError


class PieceTokenizer:
    """Text between two special tokens is one run: encoded, and decoded, as if it stood alone."""

    def __init__(self, path: Path, data: bytes, settings: TokenizerSettings, family: TokenizerFamily) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(data)
            self._num_pieces = self._model.GetPieceSize()
        except Exception as error:  # whatever the library finds wrong
            raise CheckpointError(f"cannot read {path}: it is no SentencePiece model ({error})") from error
        if not self._num_pieces:
            raise CheckpointError(f"cannot read {path}: it is no SentencePiece model with pieces")
        self._collect_tokens(path, settings, family)
        self.stop_token_ids = frozenset(self.special_tokens[name] for name in family.stops)
        self._splitter = TokenSplitter(self._beside if family.reads_special else ())
        self._prefix = [self._beside[name] for name in family.prefix]
        adds_bos = family.adds_bos if settings.add_bos_token is None else settings.add_bos_token
        self._prefix += [self._model.bos_id()] if adds_bos and self._model.bos_id() >= 0 else []
        self._suffix = [self._model.eos_id()] if settings.add_eos_token and self._model.eos_id() >= 0 else []

    @property
    def vocab_size(self) -> int:
        return 1 + max([self._num_pieces - 1, *self._texts])

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = []
        for is_token, part in self._splitter.split(text):
            ids += [self._beside[part]] if is_token else self.encode_plain(part)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_plain(self, text: str) -> list[int]:
        return list(self._model.EncodeAsIds(text))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(self._runs(token_ids, skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._texts or token_id >= self._num_pieces:
            return b"" if token_id in self._special_ids else self._texts.get(token_id, "").encode()
        if self._model.IsUnknown(token_id) or self._model.IsUnused(token_id):
            return b""
        piece: str = self._model.IdToPiece(token_id)
        is_byte = self._model.IsByte(token_id)  # "<0x0A>"
        return bytes.fromhex(piece[3:5]) if is_byte else piece.replace("▁", " ").encode()

    def _runs(self, token_ids: Sequence[int], skip_special_tokens: bool) -> Iterator[str]:
        known = (number for number in token_ids if number < self._num_pieces or number in self._texts)
        for is_beside, run in groupby(known, self._texts.__contains__):
            if not is_beside:
                yield self._model.DecodeIds(list(run))
                continue
            for number in run:
                if not (skip_special_tokens and number in self._special_ids):
                    yield self._texts[number]

    def _collect_tokens(self, path: Path, settings: TokenizerSettings, family: TokenizerFamily) -> None:
        """Tokens beside the pieces: the model's control pieces, the family's, the folder's added ones."""
        model = self._model
        control = {model.IdToPiece(n): n for n in range(self._num_pieces) if model.IsControl(n)}
        appended = {text: self._num_pieces + at for at, text in enumerate(family.appended)}
        added = {text: n for text, n in settings.added_tokens.items() if not self._is_piece(path, text, n)}
        self._beside = control | appended | added
        self._texts = {number: text for text, number in self._beside.items()}
        special = control.keys() | appended.keys() | (settings.special & added.keys())
        self.special_tokens: Mapping[str, int] = {text: self._beside[text] for text in special}
        self._special_ids = frozenset(self.special_tokens.values())

    def _is_piece(self, path: Path, text: str, token_id: int) -> bool:
        """Is this added token one of the model's pieces already? It must not take the id of another."""
        if token_id >= self._num_pieces:
            return False
        if self._model.IdToPiece(token_id) != text:
            raise CheckpointError(
                f"{path}: id {token_id} is {self._model.IdToPiece(token_id)!r}, "
                f"but {text!r} in the files beside it"
            )
        return True
