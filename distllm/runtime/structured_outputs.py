"""StructuredOutputsParams: what an answer must look like. Names as in vLLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from distllm.errors import RequestError
from distllm.runtime.bounds import check_bool, check_list, check_text

MAX_GRAMMAR_CHARS = 2**16
MAX_REGEX_CHARS = 2**12
MAX_CHOICES = 2**10
MAX_DEPTH = 64  # of objects and lists in a schema


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one of the first five fields. Checked when made; raises RequestError with the field, the value
    and the limit.
    """

    json: str | dict[str, Any] | bool | None = None  # a JSON schema
    regex: str | None = None  # the whole answer matches it
    choice: Sequence[str] | None = None  # the answer is one of these
    grammar: str | None = None  # Lark, or EBNF as in llama.cpp (`root ::= …`)
    json_object: bool | None = None  # any JSON object
    disable_any_whitespace: bool = False  # of JSON: none but ", " and ": "

    def __post_init__(self) -> None:
        self._check_one()
        check_bool("disable_any_whitespace", self.disable_any_whitespace)
        if self.json_object is not None:
            check_bool("json_object", self.json_object)
        if self.regex is not None:
            check_text("regex", self.regex, MAX_REGEX_CHARS)
        if self.grammar is not None:
            check_text("grammar", self.grammar, MAX_GRAMMAR_CHARS)
        if self.choice is not None:
            self._check_choice(self.choice)
        if self.json is not None:
            self._check_schema()

    def _check_one(self) -> None:
        kinds = [field.name for field in fields(self) if field.name != "disable_any_whitespace"]
        given = [kind for kind in kinds if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs has {' and '.join(given) or 'nothing'}; it must have exactly one of "
                + ", ".join(kinds)
            )

    @staticmethod
    def _check_choice(choice: Sequence[str]) -> None:
        check_list("choice", choice, MAX_CHOICES)
        for index, text in enumerate(choice):
            check_text(f"choice[{index}]", text, MAX_GRAMMAR_CHARS)
        if not 1 <= sum(map(len, choice)) <= MAX_GRAMMAR_CHARS:
            raise RequestError(
                f"choice has {sum(map(len, choice))} characters; it must have 1 to {MAX_GRAMMAR_CHARS}"
            )

    def _check_schema(self) -> None:
        if isinstance(self.json, str):
            check_text("json", self.json, MAX_GRAMMAR_CHARS)
            check_depth(self.json)
        _ = self.schema

    @property
    def schema(self) -> str:
        """The schema as text."""
        schema = self._parsed()
        check_nested(schema)
        try:
            text = json.dumps({} if schema is True else schema)
        except (TypeError, ValueError) as error:
            raise RequestError(f"json is no schema: {error}") from None
        check_text("json, as text,", text, MAX_GRAMMAR_CHARS)
        return text

    def _parsed(self) -> Any:
        if isinstance(self.json, dict | bool):
            return self.json
        if not isinstance(self.json, str):
            raise RequestError(f"json is a {type(self.json).__name__}; it must be a dict or text")
        try:
            return json.loads(self.json)
        except ValueError as error:
            raise RequestError(f"json is no JSON: {error}") from None


def check_depth(text: str) -> None:
    """Of the brackets of a text, those in strings too: before anything that recurses reads it."""
    depth = 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if depth > MAX_DEPTH:
            raise RequestError(f"json is nested more than {MAX_DEPTH} deep")


def check_nested(schema: Any) -> None:
    """Level by level, each item once; what holds itself is too deep."""
    level, items = [schema], 0
    for _ in range(MAX_DEPTH + 1):
        level = [inner for part in level for inner in _parts(part)]
        items += len(level)
        if items > MAX_GRAMMAR_CHARS:
            raise RequestError(f"json has more than {MAX_GRAMMAR_CHARS} values")
        if not level:
            return
    raise RequestError(f"json is nested more than {MAX_DEPTH} deep")


def _parts(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list | tuple) else ()
