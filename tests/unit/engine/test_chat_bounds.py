"""Templates that would run for ever or fill the memory: each stops with one line, soon and in little memory;
long honest chats do not. Most run with a small budget: what counts is that nothing is done that is not spent.
"""

from __future__ import annotations

import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from distllm.engine.chat import budget
from distllm.errors import CheckpointError, RequestError
from tests.unit.engine.test_chat import GEMMA, HELLO, LLAMA_3, QWEN_2, SYSTEM, TOOLS, chat_of, render, say

SMALL_BUDGET = 2**14  # or 256 KiB of text
BIG = "{% set x = 'a' * 60000 %}"
MANY = "{% for i in range(99999) %}"
END = "{% endfor %}"
VALUES = "{% set ns = namespace(text='ab', list=[1], number=3) %}"


def nested(then: str) -> str:
    """y and z are lists, t a tuple, that hold the one before twice: 2^60 items when written out."""
    double = "{% set y = [y, y] %}{% set z = [z, z] %}{% set t = (t, t) %}"
    return "{% set y = [1] %}{% set z = [1] %}{% set t = (1,) %}" + double * 60 + then


BOMBS = {
    "loops": MANY * 3 + END * 3,
    "loops that find nothing": MANY + "{% for j in range(99999) if false %}{% endfor %}" + END,
    "a loop with a long body": MANY + "{% if a %}{% endif %}" * 99 + END,
    "a loop that writes": MANY + "a" * 9999 + END,
    "a loop that reads": MANY + "{% set b = messages[0].content %}" * 999 + END,
    "a filter block": "{% filter upper %}" + MANY * 2 + "a" + END * 2 + "{% endfilter %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loops": "{% for a in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}"
    + END,
    "+ of texts": VALUES + MANY + "{% set ns.text = ns.text + ns.text %}" + END,
    "+ of lists": VALUES + MANY + "{% set ns.list = ns.list + ns.list %}" + END,
    "+ of numbers": VALUES + MANY + "{% set ns.number = ns.number + ns.number %}" + END,
    "* of texts": "{{ 'a' * 10**10 }}",
    "* of lists": "{{ [0] * 10**10 }}",
    "~": VALUES + MANY + "{% set ns.text = ns.text ~ ns.text %}" + END,
    "~ in a row": BIG + "{% set y = " + "~".join(["x"] * 999) + " %}",
    "set blocks": "{% set x %}ab{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "slices": BIG + "{% set y = x[1:] %}" * 10,
    "comparisons": BIG + "{% set y = x[1:] %}" + "{% if x == y %}{% endif %}" * 10,
    "looking for": BIG + "{% if 'b' in x %}{% endif %}" * 10,
    "join": BIG + "{{ x.join(x) }}",
    "join, a filter": BIG + "{{ x | join(x) }}",
    "join by an attribute": BIG + "{{ range(9999) | join(attribute='q', d=x) }}",
    "join, named": BIG + "{{ range(9999) | join(d=x) }}",
    "join of defaults": BIG + "{{ range(9999) | map('default', x) | join }}",
    "join of attributes": BIG + "{{ range(9999) | map(attribute='q', default=x) | join }}",
    "replace": BIG + "{{ x.replace('a', x) }}",
    "replace, a filter": BIG + "{{ x | replace('', x) }}",
    "replace, named": BIG + "{{ x | replace(new=x, old='a') }}",
    "split": BIG + "{{ x.split('a') | length }}",
    "list": BIG + "{{ x | list | length }}",
    "search from the right": BIG + "{{ x.rfind('b' + 'a' * 20000) }}",
    "strip": BIG + "{{ x.strip('b' * 20000 + 'a') }}",
    "trim": BIG + "{{ x | trim('b' * 20000 + 'a') }}",
    "indent": "{{ 'a' | indent(10**9) }}",
    "indent, backwards": "{{ 'a' | indent(-(10**9)) }}",
    "indented lines": "{{ ('a\\n' * 9999) | indent(width='a' * 9999) }}",
    "indented JSON": "{% set y = [1] * 99 %}" + "{% set y = [y] %}" * 99 + "{{ y | tojson(indent=9999) }}",
    "JSON's separators": "{% set x = 'a' * 99999 %}{{ ([1] * 9999) | tojson(separators=(x, x)) }}",
    "nested text": nested("{{ y }}"),
    "nested ~": nested("{{ y ~ '' }}"),
    "nested JSON": nested("{{ y | tojson }}"),
    "nested string": nested("{{ y | string }}"),
    "nested values": nested("{{ {'a': y}.values() }}"),
    "nested items": nested("{{ {'a': y} | items | list }}"),
    "nested once": nested("{{ [y] | reverse | join }}"),
    "nested error": nested("{{ raise_exception(y) }}"),
    "nested date": nested("{{ strftime_now(y) }}"),
    "nested ==": nested("{% if y == z %}{% endif %}"),
    "nested <": nested("{% if y < z %}{% endif %}"),
    "nested in": nested("{% if y in [z] %}{% endif %}"),
    "nested test": nested("{% if y is eq z %}{% endif %}"),
    "nested select": nested("{{ [y] | select('eq', z) | list | length }}"),
    "nested index": nested("{{ [y].index(z) }}"),
    "nested sort": nested("{{ [y, z] | sort | length }}"),
    "nested changes": nested("{% for k in [y, z] %}{{ loop.changed(k) }}{% endfor %}"),
    "nested key": nested("{% set d = {t: 1} %}"),
    "nested key to get": nested("{{ messages[0].get(t) }}"),
    "nested key to find": nested("{{ messages[0][t] }}"),
    "nested unique": nested("{{ [t] | unique | list | length }}"),
    "what is not a key": nested("{{ messages[0][y] }}"),
    "nested trim": nested("{{ y | trim }}"),
    "nested == in a row": nested("{% if y == z != 1 %}{% endif %}"),
    "nested name of a filter": nested("{% if t is filter %}{% endif %}"),
    "replace in a list": BIG + "{{ [1, 1, 1, 1] | replace('1', x) }}",
    "join by a list": "{{ range(9999) | join([1] * 9999) }}",
}


def stopped(folder: Path, template: str, match: str) -> None:
    chat = chat_of(folder, template)
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(RequestError, match=match) as caught:
            render(chat, [HELLO])
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 5
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", BOMBS)
def test_nothing_is_done_that_is_not_spent(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "MAX_STEPS", SMALL_BUDGET)
    stopped(tmp_path, BOMBS[name], f"takes more than {SMALL_BUDGET} steps")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (MANY + "{{ 'a' * 1000 }}" + END, "writes more than 8388608 characters"),
        (VALUES + MANY + "{% set ns.number = ns.number * ns.number %}" + END, "more than 16384 bits"),
        ("{{ 9 ** 999999999 }}", "more than 64"),
        ("{{ '%0999999999d' % 1 }}", "'%' formats"),
        ("{{ '{:999999999}'.format(1) }}", "attribute 'format' of a str"),
        ("{{ '{:999999999}' | attr('format') }}", "attribute 'format' of a str"),
        ("{{ 'a'.center(999999999) }}", "attribute 'center' of a str"),
        ("{{ (5).to_bytes(999999999) }}", "attribute 'to_bytes' of a int"),
        ("{% set ns = namespace() %}{% set ns.a = [ns, ns] %}{{ ns.a }}", "a namespace as text"),
        ("{% set ns = namespace() %}{% set ns.a = [ns, ns] %}{{ ns }}", "a namespace as text"),
        ("{{ lipsum(999999999) }}", "'lipsum' is undefined"),
        (nested("{{ namespace(unsafe_callable=1, y=y)() }}"), "a _Namespace is called"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% block a %}{{ self.a() }}{% endblock %}", "recursion"),
        ("{{ raise_exception('a\\nb' * 999) }}", "refuses these messages: a ba ba b"),
        *((f"{{% {tag} %}}", "no loader") for tag in ("include '/etc/passwd'", "extends '/etc/passwd'")),
        *((f"{{% {tag} %}}", "no loader") for tag in ("import '/x' as x", "from '/x' import x")),
    ],
)
def test_what_templates_do_not_have(template: str, message: str, tmp_path: Path) -> None:
    stopped(tmp_path, template, message)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "cannot be parsed"),
        ("a" * 2**16 + "b", "65537 characters"),
        ("{{ " + "(" * 30000, "cannot be parsed"),
        ("{{ " + "1 + " * 9999 + "1 }}", "cannot be parsed"),
        ("{{ " + "9" * 60000 + " }}", "cannot be parsed"),
        ("{% if a %}" + "{% elif a %}" * 4000 + "{% endif %}", "cannot be parsed"),
        ("{% for a in b %}" * 30 + "{% endfor %}" * 30, "cannot be parsed"),
        ("{{ 5 | round(-999999999) }}", "No filter named 'round'"),
    ],
)
def test_templates_that_do_not_load(template: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        chat_of(tmp_path, template)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_nothing_is_worked_out_while_loading(tmp_path: Path) -> None:
    """Jinja would work out what is constant, with no budget to spend."""
    began = time.process_time()
    chat = chat_of(tmp_path, "{{ 'a' | indent(10**9) }}{{ 'a' * 10**9 }}{{ 'a' ~ 'b' }}{{ '\\n' | upper }}")
    assert time.process_time() - began < 2
    with pytest.raises(RequestError, match="steps"):
        render(chat, [HELLO])


@pytest.mark.parametrize("template", [LLAMA_3, QWEN_2, GEMMA], ids=["llama-3", "qwen-2", "gemma"])
def test_a_long_chat_is_within_the_budget(template: str, tmp_path: Path) -> None:
    """Of 4 MB in 4,000 messages, more than a million tokens, with 100 tools."""
    system = [] if template is GEMMA else [SYSTEM]
    turns = [say("user", "x" * 1000), say("assistant", "y" * 1000)] * 2000
    sent: list[Any] = []

    class Tokenizer:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            sent.append(text)
            return []

    chat: Any = chat_of(tmp_path, template)
    chat._tokenizer = Tokenizer()
    render(chat, [*system, *turns], TOOLS * 100)
    assert sent[0].count("x" * 1000) == 2000


def test_each_thread_has_its_own_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_STEPS", SMALL_BUDGET)
    chat = chat_of(tmp_path, "{% for m in messages %}{{ m.content ~ m.content }}{% endfor %}")
    cheap, dear = [say("user", "x" * 1000)] * 9, [say("user", "x" * 100000)] * 9
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(render, chat, messages) for messages in [cheap, dear] * 9]
    for job in jobs[::2]:
        assert len(job.result().text) == 18000
    for job in jobs[1::2]:
        assert isinstance(job.exception(), RequestError)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loops", "recursive loops", "macros", "~", "list", "nested ~"])
def test_with_the_whole_budget(name: str, tmp_path: Path) -> None:
    began = time.process_time()
    with pytest.raises(RequestError, match=f"takes more than {budget.MAX_STEPS} steps"):
        render(chat_of(tmp_path, BOMBS[name] * (99 if name == "list" else 1)), [HELLO])
    assert time.process_time() - began < 30
