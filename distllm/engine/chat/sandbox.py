"""Hugging Face's dialect of Jinja in a sandbox: plain data, the calls of a table, and a budget for all of it.

Nothing is worked out before a rendering: there is no budget then.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import Template, TemplateError, Undefined, nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from distllm.engine.chat.budget import CHARS_PER_STEP, Once
from distllm.engine.chat.costs import FILTERS, METHODS, TESTS, Cost, count_items, everything, operand
from distllm.engine.chat.metering import BUDGET, Meter, Metering

MAX_EXPONENT = 64
MAX_INT_BITS = 2**14


class Sandbox(ImmutableSandboxedEnvironment):
    """What transformers gives to chat templates, as far as its cost can be told, and no more."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        extensions = [_Generation, loopcontrols, Meter]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_written, optimized=False
        )
        given = {**self.filters, "tojson": _to_json}
        self.filters = {name: _metered(given[name], cost) for name, cost in FILTERS.items()}
        self.tests.update({name: _metered(self.tests[name], cost) for name, cost in TESTS.items()})
        self.globals = {"range": self.globals["range"], "dict": dict, "namespace": _Namespace}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def template(self, text: str) -> Template:
        """Raises anything that Python's compiler or Jinja's may."""
        meter = self.extensions[Meter.identifier]
        tree: nodes.Template = Metering(meter).visit(self.parse(text))  # type: ignore[arg-type]
        return self.from_string(tree)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        methods = _methods_of(obj)
        is_known = isinstance(obj, LoopContext | Macro | Namespace | Undefined)
        is_allowed = is_known if methods is None else attr in methods
        return is_allowed and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Jinja's own sandbox quietly writes nothing."""
        raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__}")

    def wrap_str_format(self, value: Any) -> None:
        """str.format is in no table: how wide its fields are cannot be told before."""

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(obj, "__self__", None), Meter):
            return obj(*args)
        if not callable(obj):
            raise TemplateError(f"a {type(obj).__name__} is called")
        _spend(1 + _cost_of_call(obj, [*args, *kwargs.values()]))
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Texts of any width, and numbers of any length, are no part of a chat."""
        if operator == "%" and isinstance(left, str):
            raise SecurityError("'%' formats; use '~' or '+'")
        if any(isinstance(each, int) and each.bit_length() > MAX_INT_BITS for each in (left, right)):
            raise SecurityError(f"{operator!r} with a number of more than {MAX_INT_BITS} bits")
        if operator == "**" and abs(right) > MAX_EXPONENT:
            raise SecurityError(f"'**' with more than {MAX_EXPONENT}")
        _spend(1 + _cost_of_binop(operator, left, right))
        return super().call_binop(context, operator, left, right)


def _spend(steps: int) -> None:
    BUDGET.get().spend(steps)


def _methods_of(obj: Any) -> Mapping[str, Cost] | None:
    return next((METHODS[kind] for kind in METHODS if isinstance(obj, kind)), None)


def _cost_of_call(obj: Any, arguments: list[Any]) -> int:
    owner = getattr(obj, "__self__", None)
    methods = _methods_of(owner)
    if methods is not None:
        return methods[obj.__name__](BUDGET.get(), owner, *arguments)
    if obj is dict or obj is _Namespace:  # copies
        return sum(map(count_items, arguments))
    if isinstance(obj, Macro):
        return len(arguments)
    return everything(BUDGET.get(), *arguments)


def _cost_of_binop(operator: str, left: Any, right: Any) -> int:
    """Of a product with a text or a list: all that it becomes. Of a power: at most so many products."""
    for value, times in ((left, right), (right, left)):
        if operator == "*" and isinstance(value, str | list | tuple) and isinstance(times, int):
            return len(value) * max(times, 0) // (CHARS_PER_STEP if isinstance(value, str) else 1)
    products = MAX_EXPONENT if operator == "**" else 1
    return operand(BUDGET.get(), left) * products + operand(BUDGET.get(), right)


def _metered(function: Any, cost: Cost) -> Callable[..., Any]:
    """A filter or a test that spends before it works. What it gives item by item is worked out at once."""
    first = int(hasattr(function, "jinja_pass_arg"))  # Jinja's own argument

    @wraps(function)
    def spend_and_call(*args: Any, **kwargs: Any) -> Any:
        _spend(1 + cost(BUDGET.get(), *args[first:], *kwargs.values()))
        result = function(*args, **kwargs)
        return Once(result) if isinstance(result, Iterator) and not isinstance(result, Once) else result

    return spend_and_call


@pass_eval_context
def _written(context: EvalContext, value: Any) -> Any:
    _spend(everything(BUDGET.get(), value))
    return value


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


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
