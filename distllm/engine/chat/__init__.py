"""From a conversation to a prompt, as the model folder says or as its family does. Runs no code from it.

The folder's template first (templates); families that never had one have formats of token ids (formats).
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distllm.engine.chat.base import Chat, ChatFormat, ChatPrompt, Conversation
from distllm.engine.chat.formats import find_format
from distllm.engine.chat.templates import MAX_TEMPLATE_BYTES, ChatTemplates
from distllm.engine.files import find_file, read_bytes
from distllm.engine.tokenizers import Tokenizer
from distllm.engine.tokenizers.settings import read_settings
from distllm.errors import CheckpointError, RequestError

__all__ = ["Chat", "ChatFormat", "ChatPrompt", "as_conversations", "load_chat_format"]

TEMPLATE_FILE = "chat_template.jinja"


def load_chat_format(folder: Path, tokenizer: Tokenizer) -> ChatFormat | None:
    """How conversations are written for this model; None if neither folder nor family says.

    Raises CheckpointError for a template that cannot be parsed.
    """
    settings = read_settings(folder)
    templates = dict(settings.chat_templates)
    if file := find_file(folder, TEMPLATE_FILE):
        templates = {"default": _read_template(file)}
    if templates:
        return ChatTemplates(folder, templates, settings.names, tokenizer)
    return find_format(folder, settings, tokenizer)


def as_conversations(messages: Any) -> list[Conversation]:
    """One conversation or many, as a list of plain JSON data: a template must meet no object with methods.

    Raises RequestError for what is no message.
    """
    try:
        plain = json.loads(json.dumps(messages, ensure_ascii=False).encode())  # half a surrogate pair fails
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"messages must be plain JSON data: {error}") from None
    many = [plain] if isinstance(plain, list) and plain and isinstance(plain[0], dict) else plain
    if not isinstance(many, list) or not many or not all(map(_is_conversation, many)):
        raise RequestError(
            "messages must be a list of {role, content}, or a list of such lists; none may be empty"
        )
    for message in (message for messages in many for message in messages):
        _refuse_pictures(message.get("content"))
    return many


def _refuse_pictures(content: Any) -> None:
    """A template would write a mark in their place, and the model would answer as if it saw them."""
    parts = content if isinstance(content, list) else []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text":
            raise RequestError(f"a message has a part of type {reprlib.repr(kind)}; only text is read")


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, Sequence)
        and len(messages) > 0
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages)
    )


def _read_template(path: Path) -> str:
    try:
        return read_bytes(path, MAX_TEMPLATE_BYTES).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is no UTF-8 text: {error}") from error
