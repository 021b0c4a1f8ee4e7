"""What a chat format is: messages in, a prompt out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

Conversation: TypeAlias = list[dict[str, Any]]  # messages, each with a role, and a content for most


class ChatPrompt(NamedTuple):
    """text: for people; None where the format is one of token ids alone."""

    text: str | None
    token_ids: list[int]


class ChatFormat(Protocol):
    def render(
        self,
        messages: Conversation,
        *,
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> ChatPrompt:
        """add_generation_prompt: end where the assistant's answer begins. variables: what else the template
        asks for.

        Raises RequestError for messages that the format refuses.
        """
        ...
