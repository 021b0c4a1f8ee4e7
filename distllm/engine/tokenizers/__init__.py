"""Text to token ids and back, from a model folder's own files. Runs no code from the folder.

One file per kind: library (tokenizer.json), pieces (SentencePiece) and ranks (tiktoken). What a family adds
to its file is a table in families.
"""

from __future__ import annotations

from pathlib import Path

from distllm.engine.files import find_file, read_bytes
from distllm.engine.tokenizers.base import Tokenizer
from distllm.engine.tokenizers.families import find_family
from distllm.engine.tokenizers.library import LibraryTokenizer
from distllm.engine.tokenizers.pieces import PieceTokenizer
from distllm.engine.tokenizers.ranks import RankTokenizer, looks_like_ranks
from distllm.engine.tokenizers.settings import read_settings

__all__ = ["Tokenizer", "load_tokenizer"]

TOKENIZER_JSON = "tokenizer.json"
MODEL_FILES = ("tokenizer.model", "qwen.tiktoken")  # either name may hold either kind
MAX_MODEL_BYTES = 64 * 2**20


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model or engine folder; None where there is none, and prompts must be token ids.

    Raises CheckpointError, naming the file, for whatever is wrong with it.
    """
    settings = read_settings(folder)
    if path := find_file(folder, TOKENIZER_JSON):
        return LibraryTokenizer(path, settings)
    for name in MODEL_FILES:
        if path := find_file(folder, name):
            data = read_bytes(path, MAX_MODEL_BYTES)
            kind = RankTokenizer if looks_like_ranks(data) else PieceTokenizer
            return kind(path, data, settings, find_family(settings))
    return None
