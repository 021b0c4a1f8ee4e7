"""What the JSON files beside a tokenizer say: added tokens, the names of special ones, whether bos is added.

Reads tokenizer_config.json, special_tokens_map.json and added_tokens.json. Knows no kind of tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distllm.engine.files import find_file, read_json
from distllm.errors import CheckpointError

CONFIG, NAMES, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_ADDED_TOKENS = 2**16
MAX_TOKEN_ID = 2**22


@dataclass(frozen=True)
class TokenizerSettings:
    """All empty where the folder has none of the files."""

    tokenizer_class: str
    source: str  # whose files these were, as their author named it
    add_bos_token: bool | None  # None: the files do not say
    add_eos_token: bool
    added_tokens: dict[str, int]  # in order of ids
    special: frozenset[str]  # of added_tokens and names: those that are no text
    names: dict[str, str]  # bos_token, eos_token, …: their texts
    chat_templates: dict[str, str]  # by name; the only one is "default"


def read_settings(folder: Path) -> TokenizerSettings:
    """Raises CheckpointError, naming the file, for what is no JSON or no token."""
    config = _read(folder, CONFIG)
    names = _names(folder, _read(folder, NAMES) | config)
    entries = [*_added_json(folder), *_added_decoder(folder, config)]
    if len(entries) > MAX_ADDED_TOKENS:
        raise CheckpointError(
            f"{folder}: {len(entries)} added tokens; at most {MAX_ADDED_TOKENS} are allowed"
        )
    special = {text for text, _, is_special in entries if is_special} | set(names.values())
    return TokenizerSettings(
        tokenizer_class=str(config.get("tokenizer_class", "")),
        source=str(config.get("name_or_path", "")),
        add_bos_token=config.get("add_bos_token"),
        add_eos_token=bool(config.get("add_eos_token", False)),
        added_tokens={text: token_id for text, token_id, _ in sorted(entries, key=lambda entry: entry[1])},
        special=frozenset(special),
        names=names,
        chat_templates=_chat_templates(folder, config.get("chat_template")),
    )


def _read(folder: Path, name: str) -> dict[str, Any]:
    file = find_file(folder, name)
    return read_json(file) if file else {}


def _names(folder: Path, data: dict[str, Any]) -> dict[str, str]:
    texts = {name: _text_of(data[name]) for name in SPECIAL_NAMES if data.get(name) is not None}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise CheckpointError(f"{folder}: {name} is {text!r}; it must be a text")
    return texts


def _text_of(token: Any) -> Any:
    """A token is its text, or an object that holds it."""
    return token.get("content") if isinstance(token, dict) else token


def _added_json(folder: Path) -> Iterator[tuple[str, int, bool]]:
    for text, token_id in _read(folder, ADDED).items():
        yield _checked(folder / ADDED, text, token_id, False)


def _added_decoder(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, int, bool]]:
    """Ids are keys here, and so texts."""
    tokens = config.get("added_tokens_decoder") or {}
    if not isinstance(tokens, dict):
        raise CheckpointError(f"{folder / CONFIG}: added_tokens_decoder is no object")
    for key, token in tokens.items():
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else key
        is_special = isinstance(token, dict) and token.get("special") is True
        yield _checked(folder / CONFIG, _text_of(token), token_id, is_special)


def _checked(path: Path, text: Any, token_id: Any, is_special: bool) -> tuple[str, int, bool]:
    is_id = isinstance(token_id, int) and not isinstance(token_id, bool) and 0 <= token_id < MAX_TOKEN_ID
    if not is_id or not isinstance(text, str) or not text:
        raise CheckpointError(f"{path}: {text!r} with id {token_id!r} is no token")
    return text, token_id, is_special


def _chat_templates(folder: Path, value: Any) -> dict[str, str]:
    """A text, or a list of {name, template}."""
    try:
        if isinstance(value, list):
            templates = {entry["name"]: entry["template"] for entry in value}
        else:
            templates = {} if value is None else {"default": value}
    except (TypeError, KeyError) as error:
        raise CheckpointError(
            f"{folder / CONFIG}: chat_template is no list of names and templates"
        ) from error
    if not all(isinstance(text, str) for text in templates.values()):
        raise CheckpointError(f"{folder / CONFIG}: chat_template is no text")
    return templates
