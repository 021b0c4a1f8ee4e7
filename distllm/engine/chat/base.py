"""What a chat format is: a chat in, a prompt out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

Conversation: TypeAlias = list[dict[str, Any]]  # messages, each with a role, and a content for most


@dataclass(frozen=True)
class Chat:
    """A conversation to be answered, and what the caller says about it."""

    messages: Conversation
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True  # end where the assistant's answer begins
    variables: Mapping[str, Any] = field(default_factory=dict)  # what else the template asks for


class ChatPrompt(NamedTuple):
    """text: for people; None where the format is one of token ids alone."""

    text: str | None
    token_ids: list[int]


class ChatFormat(Protocol):
    def render(self, chat: Chat) -> ChatPrompt:
        """Raises RequestError for what the format refuses."""
        ...
