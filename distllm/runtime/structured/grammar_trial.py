"""A process in which grammars are tried before the engine compiles them: some are small and take gigabytes,
forever, or the whole stack, and the grammar library gives a thread no way to be stopped.

The file is its own script: it imports nothing of distllm, and so starts fast. Started by
runtime.structured.grammars.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits

TIMEOUT_S = 1.0
MEMORY_BYTES = 2**30
STACK_BYTES = 2**24
MAX_ERROR_CHARS = 300
TOO_COSTLY = f"to compile it takes more than {TIMEOUT_S:.0f} s or {MEMORY_BYTES >> 20} MiB; simplify it"
WHITESPACE = r"[ \t\r\n]{0,32}"  # between the parts of a JSON text: a model may like it


class GrammarTrial:
    """Starts the process with the first grammar, and again after one that it did not survive."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, field: str, source: str) -> str:
        """What is wrong with a grammar, in one line; "" if nothing is. Takes little more than TIMEOUT_S."""
        process = self._running()
        try:
            answer = _ask(process, json.dumps([field, source]).encode() + b"\n")
        except OSError:
            answer = None
        if answer is None:
            self.close()
            return TOO_COSTLY
        return str(json.loads(answer))

    def close(self) -> None:
        if self._process is not None:
            _end(self._process)
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            pipe, command = subprocess.PIPE, [sys.executable, "-P", __file__]
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
            assert self._process.stdout is not None, "is a pipe"
            self._process.stdout.readline()  # it is ready
            weakref.finalize(self, _end, self._process)
        return self._process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _ask(process: subprocess.Popen[bytes], question: bytes) -> bytes | None:
    """The line that the process answers; None where it ends or takes too long."""
    assert process.stdin is not None and process.stdout is not None, "are pipes"
    process.stdin.write(question)
    process.stdin.flush()
    answer, deadline = b"", time.monotonic() + TIMEOUT_S
    while not answer.endswith(b"\n"):
        left = max(0.0, deadline - time.monotonic())
        part = b""
        if select.select([process.stdout], [], [], left)[0]:
            part = os.read(process.stdout.fileno(), 2**16)
        if not part:
            return None
        answer += part
    return answer


def make_grammar(field: str, source: str) -> str:
    """In the library's own language; field and source as StructuredOutputsParams.source() gives them. Raises
    ValueError for what cannot be read at all.
    """
    from llguidance import LLMatcher, grammar_from

    if field in ("json", "json_object"):
        return LLMatcher.grammar_from_json_schema(source, defaults={"whitespace_pattern": WHITESPACE})
    if field == "grammar":
        return grammar_from("grammar", source)
    if field == "regex":
        return LLMatcher.grammar_from_regex(source)
    quoted = (json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(json.loads(source)))
    return LLMatcher.grammar_from_lark("start: " + " | ".join(quoted))


def parser_limits() -> LLParserLimits:
    """A grammar that reaches one of them fails; none lets a token take more than tens of milliseconds."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=500,  # of the parser; in ambiguous grammars a token costs the cube of them
        max_lexer_states=50_000,  # of about 2 KB
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def one_line(error: str) -> str:
    """Of what the library says, what is for the user: the line that names the error, or the first."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("error:")]
    return (named or lines or ["the library gives no reason"])[0][:MAX_ERROR_CHARS]


class _Bytes:
    """A vocabulary of all bytes and an end."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    eos_token_id = 256
    special_token_ids = (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<|end|>")

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def _try(field: str, source: str) -> str:
    """Compile the grammar and find what it begins with."""
    from llguidance import LLMatcher, LLTokenizer

    try:
        grammar = make_grammar(field, source)
    except ValueError as error:
        return one_line(str(error))
    tokenizer = LLTokenizer(_Bytes())  # type: ignore[arg-type]
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
    matcher.compute_bitmask()
    return one_line(matcher.get_error()) if matcher.is_error() else ""


def _serve() -> None:
    """Until stdin closes. An alarm ends a try that nobody waits for any more."""
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(int(TIMEOUT_S) + 1)
        print(json.dumps(_try(*json.loads(line))), flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    import llguidance  # noqa: F401  # before anybody asks

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()
