"""Chat formats of families that have no template: token ids, put together as their own chat code does.

What people wrote stays text: a role spelled out in it counts as letters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distllm.engine.chat.base import Chat, ChatFormat, ChatPrompt, Conversation
from distllm.engine.resolve import read_generation_config
from distllm.engine.tokenizers import Tokenizer
from distllm.engine.tokenizers.families import CHATGLM2, CHATGLM3, GLM4, find_family
from distllm.engine.tokenizers.settings import TokenizerSettings
from distllm.errors import RequestError

QWEN_SYSTEM = "You are a helpful assistant."


def find_format(folder: Path, settings: TokenizerSettings, tokenizer: Tokenizer) -> ChatFormat | None:
    """By the tokenizer's family; Baichuan by the ids of its roles, which only chat models have."""
    if {"<|im_start|>", "<|extra_0|>"} <= tokenizer.special_tokens.keys():
        return QwenFormat(tokenizer)
    family = find_family(settings)
    if family is CHATGLM2:
        return ChatGLM2Format(tokenizer)
    if family is CHATGLM3:
        return ChatGLM3Format(tokenizer)
    if family is GLM4:
        return GLM4Format(tokenizer)
    config = read_generation_config(folder)
    user, assistant = config.get("user_token_id"), config.get("assistant_token_id")
    if isinstance(user, int) and isinstance(assistant, int):
        return BaichuanFormat(tokenizer, user, assistant)
    return None


class ChatGLM2Format:
    """Numbered rounds of question and answer, in one text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def render(self, chat: Chat) -> ChatPrompt:
        _refuse("ChatGLM2", chat.variables, tools=chat.tools)
        parts, number = [], 0
        for message in chat.messages:
            role, content = _said(message, ("user", "assistant"))
            number += role == "user"
            parts.append(f"[Round {number}]\n\n问：{content}\n\n" if role == "user" else f"答：{content}\n\n")
        text = "".join(parts) + ("答：" if chat.add_generation_prompt else "")
        return ChatPrompt(text, self._tokenizer.encode(text))


class ChatGLM3Format:
    """For each message the role's id, its metadata's line and its content, encoded apart."""

    _family = "ChatGLM3"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def render(self, chat: Chat) -> ChatPrompt:
        _refuse(self._family, chat.variables)
        ids = self._tokenizer.encode("")
        for number, message in enumerate(chat.messages):
            role, content = _said(message, ("system", "user", "assistant", "observation"))
            if chat.tools and number == 0:
                if role != "system":
                    raise RequestError(
                        "ChatGLM3 lists tools in the system message; put one before all others"
                    )
                content += "\n" + json.dumps(chat.tools, indent=4, ensure_ascii=False)
            ids += self._turn(role, str(message.get("metadata", "")), content)
        return ChatPrompt(None, ids + ([self._role("assistant")] if chat.add_generation_prompt else []))

    def _turn(self, role: str, metadata: str, content: str) -> list[int]:
        encode = self._tokenizer.encode_plain
        return [self._role(role), *encode(f"{metadata}\n"), *encode(content)]

    def _role(self, role: str) -> int:
        return self._tokenizer.special_tokens[f"<|{role}|>"]


class GLM4Format(ChatGLM3Format):
    """ChatGLM3's, but that tools are listed in words which only the folder's template has."""

    _family = "GLM-4"

    def render(self, chat: Chat) -> ChatPrompt:
        _refuse(self._family, {}, tools=chat.tools)
        return super().render(chat)


class BaichuanFormat:
    """The system's text, then an id before each message. What is too long is refused, not cut."""

    def __init__(self, tokenizer: Tokenizer, user_token_id: int, assistant_token_id: int) -> None:
        self._tokenizer = tokenizer
        self._roles = {"user": user_token_id, "assistant": assistant_token_id}

    def render(self, chat: Chat) -> ChatPrompt:
        _refuse("Baichuan", chat.variables, tools=chat.tools)
        system, rest = _split_system(chat.messages)
        ids = self._tokenizer.encode_plain(system) if system else []
        for message in rest:
            role, content = _said(message, ("user", "assistant"))
            ids += [self._roles[role], *self._tokenizer.encode_plain(content)]
        if chat.add_generation_prompt and rest and rest[-1]["role"] != "assistant":
            ids.append(self._roles["assistant"])
        return ChatPrompt(None, ids)


class QwenFormat:
    """ChatML, with Qwen's own system message where there is none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._start = tokenizer.special_tokens["<|im_start|>"]
        self._end = tokenizer.special_tokens["<|im_end|>"]
        self._newline = tokenizer.encode_plain("\n")

    def render(self, chat: Chat) -> ChatPrompt:
        _refuse("Qwen", chat.variables, tools=chat.tools)
        system, rest = _split_system(chat.messages)
        ids = [*self._head("system"), *self._tokenizer.encode_plain(system or QWEN_SYSTEM), self._end]
        for message in rest:
            role, content = _said(message, ("user", "assistant"))
            ids += [*self._newline, *self._head(role), *self._tokenizer.encode_plain(content), self._end]
        return ChatPrompt(
            None, ids + ([*self._newline, *self._head("assistant")] if chat.add_generation_prompt else [])
        )

    def _head(self, role: str) -> list[int]:
        return [self._start, *self._tokenizer.encode_plain(role), *self._newline]


def _split_system(messages: Conversation) -> tuple[str, Conversation]:
    if messages[0]["role"] != "system":
        return "", messages
    return _said(messages[0], ("system",))[1], messages[1:]


def _said(message: dict[str, Any], roles: tuple[str, ...]) -> tuple[str, str]:
    role, content = message["role"], message.get("content")
    if role not in roles:
        raise RequestError(f"a message of role {role!r}; this model's chat has {', '.join(roles)}")
    if not isinstance(content, str):
        raise RequestError(f"the content of a {role} message must be text")
    return role, content


def _refuse(family: str, variables: Mapping[str, Any], **unknown: Any) -> None:
    """A format without a template has no use for these; to leave them out would be to ignore them."""
    names = [*variables, *(name for name, value in unknown.items() if value)]
    if names:
        raise RequestError(f"{family}'s chat format knows no {', '.join(names)}; leave it out")
