"""Text to token ids and back, from a model folder's tokenizer.json. Runs no code from the folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distllm.errors import CheckpointError


class Tokenizer:
    """The folder's tokenizer, through the tokenizers library."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Library

        try:
            self._library = Library.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for whatever is wrong in the file
            raise CheckpointError(f"cannot read {path}: {error}") from error

    @property
    def vocab_size(self) -> int:
        return self._library.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the folder's post-processor adds (bos)."""
        return list(self._library.encode(text).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._library.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model or engine folder; None where there is none, and prompts must be token ids."""
    path = folder / "tokenizer.json"
    return Tokenizer(path) if path.is_file() else None
