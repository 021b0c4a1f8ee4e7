"""What templates may call, and what each call costs beside its one step. Tables; what is in none is refused.

A cost is a bound on the items and characters that the call reads or makes, in the steps of a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from distllm.engine.chat.budget import CHARS_PER_STEP, Budget, Once

Cost: TypeAlias = Callable[..., int]  # of a budget, the value and the arguments


def nothing(budget: Budget, *values: Any) -> int:
    return 0


def everything(budget: Budget, *values: Any) -> int:
    """All that is in them, once."""
    return sum(budget.measure(value).steps for value in values)


def items(budget: Budget, value: Any, *arguments: Any) -> int:
    """Each item of the value, and not what is in it."""
    return (1 + count_items(value)) * (1 + everything(budget, *arguments))


def operand(budget: Budget, value: Any) -> int:
    """Of a sum or a slice: a text's characters, a list's items and not what is in them."""
    return everything(budget, value) if isinstance(value, str | int) else count_items(value)


def count_items(value: Any) -> int:
    if isinstance(value, Once):
        return len(value.items)
    return len(value) if hasattr(value, "__len__") else 1


def _key(budget: Budget, value: Any, key: Any, *default: Any) -> int:
    """A key that is a tuple is hashed, all of it."""
    return everything(budget, key)


def _num_chars(budget: Budget, value: Any) -> int:
    """Of a value as a text, about."""
    return len(value) if isinstance(value, str) else CHARS_PER_STEP * everything(budget, value)


def _pieces(budget: Budget, text: str, *arguments: Any) -> int:
    separators = [each for each in arguments if isinstance(each, str) and each]
    return everything(budget, text, *arguments) + (text.count(separators[0]) if separators else len(text))


def _every_pair(budget: Budget, text: Any, *arguments: Any) -> int:
    """Of characters of both: what Python searches from the right, or for any of some characters."""
    others = 1 + sum(_num_chars(budget, argument) for argument in arguments)
    return _num_chars(budget, text) * others // CHARS_PER_STEP


def _replaced(budget: Budget, text: Any, *arguments: Any) -> int:
    """Named arguments may come as new and old."""
    whole = everything(budget, text, *arguments)
    return whole + max(_copies(budget, text, *arguments[:2]), _copies(budget, text, *arguments[1::-1]))


def _copies(budget: Budget, text: Any, old: Any = None, new: Any = None) -> int:
    is_known = isinstance(text, str) and isinstance(old, str)
    times = text.count(old) if is_known else _num_chars(budget, text)
    return times * _num_chars(budget, new) // CHARS_PER_STEP


def _joined(budget: Budget, values: Any, *between: Any) -> int:
    num_chars = count_items(values) * sum(_num_chars(budget, each) for each in between)
    return everything(budget, values, *between) + num_chars // CHARS_PER_STEP


def _joins(budget: Budget, text: str, values: Any) -> int:
    """The method, of what stands between."""
    return _joined(budget, values, text)


def _indented(budget: Budget, text: Any, *arguments: Any) -> int:
    width = 4 + sum(abs(each) if isinstance(each, int) else count_items(each) for each in arguments)
    num_lines = 1 + len(text.splitlines()) if isinstance(text, str) else 1
    return everything(budget, text) + num_lines * width


def _json(budget: Budget, value: Any, *arguments: Any) -> int:
    between = sum(abs(each) if isinstance(each, int) else everything(budget, each) for each in arguments)
    steps, depth = budget.measure(value)
    return steps * (1 + between * (1 + depth) // CHARS_PER_STEP)


def _sorted(budget: Budget, value: Any, *arguments: Any) -> int:
    return everything(budget, value) * count_items(value).bit_length()


def _table(*rows: tuple[Cost, str]) -> Mapping[str, Cost]:
    return {name: cost for cost, names in rows for name in names.split()}


FILTERS = _table(
    (nothing, "abs attr count d default first last length"),
    (everything, "capitalize e escape float forceescape int lower max min safe string title unique upper"),
    (items, "items list map reject rejectattr reverse select selectattr"),
    (_sorted, "dictsort sort"),
    (_every_pair, "trim"),
    (_replaced, "replace"),
    (_joined, "join"),
    (_indented, "indent"),
    (_json, "tojson"),
)
# Of tests, those that look into a value; all others look at its type.
TESTS = _table(
    (everything, "== != < <= > >= eq equalto ge greaterthan gt in le lessthan lt ne"),
    (everything, "filter lower test upper"),
)
METHODS: Mapping[type, Mapping[str, Cost]] = {
    str: _table(
        (everything, "capitalize casefold count endswith find index lower partition removeprefix"),
        (everything, "removesuffix startswith swapcase title upper"),
        (everything, "isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace istitle isupper"),
        (_pieces, "split splitlines"),
        (_every_pair, "lstrip rfind rindex rpartition rsplit rstrip strip"),
        (_replaced, "replace"),
        (_joins, "join"),
    ),
    dict: _table((nothing, "items keys values"), (_key, "get")),
    list: _table((everything, "count index")),
    tuple: _table((everything, "count index")),
}
