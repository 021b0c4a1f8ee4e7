"""StructuredOutputsParams: the form that a text must have. Field names as in vLLM.

Checks sizes and nesting before anything parses or recurses; whether the grammar itself is right is found out
by runtime.structured.grammars. Knows no token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from reprlib import repr as shorten
from typing import Any

from distllm.errors import RequestError
from distllm.runtime.bounds import check_bool, check_list, check_text

MAX_GRAMMAR_CHARS = 2**17  # of a schema, a grammar, or all choices
MAX_DEPTH = 100
MAX_REGEX_CHARS = 2**13
MAX_CHOICES = 2**10
MAX_CHOICE_CHARS = 2**10

_STRINGS = re.compile(r'(?s)"(?:[^"\\]|\\.?)*+"?')  # matches at every quote: looks once
_BRACKETS = {"{": 1, "[": 1, "(": 1, "}": -1, "]": -1, ")": -1}


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one of them. Raises RequestError with the field, the value and the limit."""

    json: Mapping[str, Any] | str | type | None = None  # a JSON schema, or a pydantic model that has one
    json_object: bool = False  # any JSON object
    regex: str | None = None  # the whole text matches
    choice: Sequence[str] | None = None  # one of these texts
    grammar: str | None = None  # Lark, or EBNF as llama.cpp writes it

    def __post_init__(self) -> None:
        check_bool("structured_outputs.json_object", self.json_object)
        given = [each.name for each in fields(self) if getattr(self, each.name) not in (None, False)]
        if len(given) != 1:
            names = ", ".join(each.name for each in fields(self))
            raise RequestError(
                f"structured_outputs has {' and '.join(given) or 'nothing'}; give exactly one of {names}"
            )
        _ = self.source

    @cached_property
    def source(self) -> tuple[str, str]:
        """(field, its text), which is what was checked: schema and choices as JSON."""
        if self.json is not None:
            return "json", _schema_text(self.json)
        if self.regex is not None:
            return "regex", _checked_text("regex", self.regex, MAX_REGEX_CHARS)
        if self.choice is not None:
            return "choice", json.dumps(_checked_choices(self.choice))
        if self.grammar is not None:
            return "grammar", _checked_nesting("grammar", self.grammar)
        return "json_object", '{"type": "object"}'


def _checked_text(name: str, text: object, max_chars: int) -> str:
    check_text(f"structured_outputs.{name}", text, max_chars)
    assert isinstance(text, str), "was checked"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"structured_outputs.{name} is no Unicode text: {error.reason}") from None
    return text


def _checked_choices(choices: object) -> list[str]:
    check_list("structured_outputs.choice", choices, MAX_CHOICES)
    assert isinstance(choices, list | tuple), "was checked"
    if not choices:
        raise RequestError("structured_outputs.choice is empty; it must have an entry")
    checked = [_checked_text(f"choice[{i}]", text, MAX_CHOICE_CHARS) for i, text in enumerate(choices)]
    _check_size("choice", sum(map(len, checked)))
    return checked


def _checked_nesting(name: str, text: object) -> str:
    """A text whose brackets, those in strings left out, are not too deep for whoever reads it recursively."""
    checked = _checked_text(name, text, MAX_GRAMMAR_CHARS)
    brackets = (_BRACKETS.get(char, 0) for char in _STRINGS.sub("", checked))
    _check_depth(name, max(accumulate(brackets), default=0))
    return checked


def _schema_text(schema: object) -> str:
    """The schema as JSON, whatever form it came in."""
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if isinstance(schema, str):
        schema = _parsed(_checked_nesting("json", schema))
    if not isinstance(schema, Mapping):
        raise RequestError(
            f"structured_outputs.json is {shorten(schema)}; it must be a JSON schema, which is an object"
        )
    _check_object(schema)
    try:
        text = json.dumps(schema, default=dict)
    except (TypeError, ValueError) as error:
        raise RequestError(f"structured_outputs.json is no JSON: {error}") from None
    return _checked_text("json", text, MAX_GRAMMAR_CHARS)


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RequestError(f"structured_outputs.json is no JSON: {error}") from None


def _check_depth(name: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise RequestError(
            f"structured_outputs.{name} is nested {depth} deep or more; at most {MAX_DEPTH} is allowed: "
            "give inner parts a name"
        )


def _check_size(name: str, num_chars: int) -> None:
    if num_chars > MAX_GRAMMAR_CHARS:
        raise RequestError(
            f"structured_outputs.{name} has {num_chars} characters or more; at most {MAX_GRAMMAR_CHARS} "
            "are allowed"
        )


def _check_object(schema: object) -> None:
    """Level by level, and no further than the limits: nothing is known of the object yet."""
    level, depth, num_chars = [schema], 1, 0
    while level:
        _check_depth("json", depth)
        inner: list[object] = []
        for part in (part for value in level for part in _parts(value)):
            num_chars += len(part) + 2 if isinstance(part, str) else 1
            _check_size("json", num_chars)
            if isinstance(part, Mapping | list | tuple):
                inner.append(part)
        level, depth = inner, depth + 1


def _parts(value: object) -> Iterator[object]:
    """What an object or a list holds, keys included."""
    if isinstance(value, Mapping):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value
