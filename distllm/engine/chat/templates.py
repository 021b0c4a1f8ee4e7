"""Chat templates in Jinja: the folder's texts, each rendered within a budget. What they may do, the sandbox
says.

A template is a program from the model folder; whatever it does ends as a prompt or as one line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError

from distllm.engine.chat.base import Chat, ChatPrompt
from distllm.engine.chat.budget import Budget
from distllm.engine.chat.metering import BUDGET
from distllm.engine.chat.sandbox import Sandbox
from distllm.engine.tokenizers import Tokenizer
from distllm.errors import CheckpointError, RequestError

MAX_TEMPLATE_BYTES = 2**16  # compilers take the square of it
MAX_OUTPUT_CHARS = 2**23
MAX_REASON = 300  # characters of what a template says itself


class ChatTemplates:
    """The folder's templates by name: `default`, and `tool_use` for conversations with tools."""

    def __init__(
        self, folder: Path, templates: Mapping[str, str], names: Mapping[str, str], tokenizer: Tokenizer
    ) -> None:
        self._names, self._tokenizer = names, tokenizer
        sandbox = Sandbox()
        self._templates = {name: _compile(folder, sandbox, name, text) for name, text in templates.items()}

    def render(self, chat: Chat) -> ChatPrompt:
        """The template writes bos and the like itself, so nothing is added to its text."""
        given = {"tools": chat.tools, "documents": None, "add_generation_prompt": chat.add_generation_prompt}
        variables = {**self._names, **given, **chat.variables, "messages": chat.messages}
        text = self._write(bool(chat.tools), variables)
        return ChatPrompt(text, self._tokenizer.encode(text, add_special_tokens=False))

    def _write(self, with_tools: bool, variables: dict[str, Any]) -> str:
        token = BUDGET.set(Budget())
        try:
            return "".join(_bounded(self._choose(with_tools).generate(**variables)))
        except SecurityError as error:
            raise RequestError(
                f"the chat template reaches for what templates may not have: {_reason(error)}"
            ) from None
        except Exception as error:  # a template can make Python raise anything
            raise RequestError(f"the chat template refuses these messages: {_reason(error)}") from None
        finally:
            BUDGET.reset(token)

    def _choose(self, with_tools: bool) -> Template:
        name = "tool_use" if with_tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise TemplateError(f"none of {', '.join(sorted(self._templates))} is the default")
        return self._templates[name]


def _compile(folder: Path, sandbox: Sandbox, name: str, text: str) -> Template:
    if len(text) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(
            f"{folder}: chat template {name!r} has {len(text)} characters; "
            f"at most {MAX_TEMPLATE_BYTES} are allowed"
        )
    try:
        return sandbox.template(text)
    except Exception as error:  # of Jinja's parser, or of Python's compiler: too deep, too large a number
        raise CheckpointError(f"{folder}: the chat template cannot be parsed: {_reason(error)}") from None


def _bounded(parts: Iterator[str]) -> Iterator[str]:
    num_chars = 0
    for part in parts:
        num_chars += len(part)
        if num_chars > MAX_OUTPUT_CHARS:
            raise TemplateError(f"it writes more than {MAX_OUTPUT_CHARS} characters")
        yield part


def _reason(error: Exception) -> str:
    """One line, however a template words it."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]}…"
