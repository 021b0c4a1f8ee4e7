"""tokenizer.json, through the tokenizers library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from distllm.engine.files import MAX_JSON_BYTES, read_bytes
from distllm.engine.tokenizers.decoders import bytes_of_pieces
from distllm.engine.tokenizers.settings import TokenizerSettings
from distllm.errors import CheckpointError


class LibraryTokenizer:
    """Everything that a family adds is in the file, but for tokens that only tokenizer_config.json lists."""

    def __init__(self, path: Path, settings: TokenizerSettings) -> None:
        from tokenizers import Tokenizer as Library

        try:
            self._library = Library.from_buffer(read_bytes(path, MAX_JSON_BYTES))
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception for whatever is wrong in the file
            raise CheckpointError(f"cannot read {path}: {error}") from error
        self._add(path, settings)
        self._added = self._library.get_added_tokens_decoder()
        self.special_tokens: Mapping[str, int] = {
            token.content: number for number, token in self._added.items() if token.special
        }
        self.stop_token_ids: frozenset[int] = frozenset()

    @property
    def vocab_size(self) -> int:
        return 1 + max(self._library.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(self._library.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_plain(self, text: str) -> list[int]:
        self._library.encode_special_tokens = True
        try:
            return self.encode(text, add_special_tokens=False)
        finally:
            self._library.encode_special_tokens = False

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._library.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return b"" if added.special else added.content.encode()
        piece = self._library.id_to_token(token_id)
        return b"" if piece is None else self._written(piece)

    @cached_property
    def _written(self) -> Callable[[str], bytes]:
        return bytes_of_pieces(self._library.decoder)

    def _add(self, path: Path, settings: TokenizerSettings) -> None:
        """The library numbers on from its last token; a file that means another id would mistake texts."""
        from tokenizers import AddedToken

        for text, token_id in settings.added_tokens.items():
            if self._library.token_to_id(text) is None:
                is_special = text in settings.special
                self._library.add_tokens([AddedToken(text, special=is_special, normalized=not is_special)])
            found = self._library.token_to_id(text)
            if found != token_id:
                raise CheckpointError(
                    f"{path}: token {text!r} has id {found}, but {token_id} in the files beside it"
                )
