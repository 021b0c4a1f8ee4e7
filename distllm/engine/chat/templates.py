"""Chat templates in Jinja, in Hugging Face's dialect, inside an immutable sandbox.

A template is a program from the model folder: it sees plain data, reaches no attribute of Python's own, and
what it may write and multiply is bounded. How long it loops is not: that is the sandbox's range alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from distllm.engine.chat.base import Chat, ChatPrompt
from distllm.engine.tokenizers import Tokenizer
from distllm.errors import CheckpointError, RequestError

MAX_TEMPLATE_BYTES = 2**20
MAX_OUTPUT_CHARS = 2**23
MAX_PRODUCT = 2**20  # characters, items or the number itself


class ChatTemplates:
    """The folder's templates by name: `default`, and `tool_use` for conversations with tools."""

    def __init__(
        self, folder: Path, templates: Mapping[str, str], names: Mapping[str, str], tokenizer: Tokenizer
    ) -> None:
        self._names, self._tokenizer = names, tokenizer
        environment = make_environment()
        try:
            for name, text in templates.items():
                if len(text) > MAX_TEMPLATE_BYTES:
                    raise CheckpointError(
                        f"{folder}: chat template {name!r} has {len(text)} characters; "
                        f"at most {MAX_TEMPLATE_BYTES} are allowed"
                    )
            self._templates = {name: environment.from_string(text) for name, text in templates.items()}
        except (TemplateError, RecursionError) as error:
            raise CheckpointError(f"{folder}: the chat template cannot be parsed: {error}") from error

    def render(self, chat: Chat) -> ChatPrompt:
        """The template writes bos and the like itself, so nothing is added to its text."""
        given = {"tools": chat.tools, "documents": None, "add_generation_prompt": chat.add_generation_prompt}
        variables = {**self._names, **given, **chat.variables, "messages": chat.messages}
        text = self._write(bool(chat.tools), variables)
        return ChatPrompt(text, self._tokenizer.encode(text, add_special_tokens=False))

    def _write(self, with_tools: bool, variables: dict[str, Any]) -> str:
        try:
            return "".join(_bounded(self._choose(with_tools).generate(**variables)))
        except SecurityError as error:
            raise RequestError(
                f"the chat template reaches for what templates may not have: {error}"
            ) from None
        except Exception as error:  # a template can make Python raise anything
            raise RequestError(f"the chat template refuses these messages: {error}") from None

    def _choose(self, with_tools: bool) -> Any:
        name = "tool_use" if with_tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise TemplateError(f"none of {', '.join(sorted(self._templates))} is the default")
        return self._templates[name]


def _bounded(parts: Iterator[str]) -> Iterator[str]:
    num_chars = 0
    for part in parts:
        num_chars += len(part)
        if num_chars > MAX_OUTPUT_CHARS:
            raise TemplateError(f"it writes more than {MAX_OUTPUT_CHARS} characters")
        yield part


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses products that would fill the memory in one expression, and says so where Jinja's own sandbox
    quietly writes nothing for an attribute.
    """

    intercepted_binops = frozenset(["*", "**", "%"])

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__}")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            sizes = [abs(x) if isinstance(x, int | float) else len(x) for x in (left, right)]
            is_bounded = sizes[0] * sizes[1] <= MAX_PRODUCT
        else:  # powers, and %-formatting, whose widths are numbers without bound
            is_bounded = not isinstance(left, str) if operator == "%" else abs(right) <= 64
        if not is_bounded:
            raise SecurityError(f"{operator!r} makes more than {MAX_PRODUCT} of something")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """{% generation %} marks what to train on; for inference it is what stands in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Macro) -> str:
        return str(caller())


class _Namespace(Namespace):
    """Jinja's own lets a template set, and so read, names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"namespace attribute {name!r}")
        super().__setitem__(name, value)


def make_environment() -> ImmutableSandboxedEnvironment:
    """Hugging Face's dialect: what transformers gives to chat templates, and no more."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace
    )
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape <, > and & for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
