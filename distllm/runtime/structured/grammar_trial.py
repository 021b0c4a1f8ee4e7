"""A process in which grammars are tried before the engine compiles them: some are small and take gigabytes,
forever, or the whole stack, and the grammar library gives a thread no way to be stopped.

The file is its own script: it imports nothing of distllm, and so starts fast. The process loads the library
and forks; what it forked tries grammars, and is replaced after one that it did not survive, which costs the
next grammar nothing. Started by runtime.structured.grammars.
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
import weakref
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from llguidance import LLParserLimits

CPU_S = 0.08  # of a try, which a busy machine does not shorten
TIMEOUT_S = 1.0  # of a try, by the clock
START_S = 60.0  # for the library to be loaded, from a slow disk too
MEMORY_BYTES = 2**30
STACK_BYTES = 2**24
MAX_ERROR_CHARS = 300
TOO_COSTLY = f"to compile it takes more than {CPU_S * 1e3:.0f} ms or {MEMORY_BYTES >> 20} MiB; simplify it"
WHITESPACE = r"[ \t\r\n]{0,32}"  # between the parts of a JSON text: a model may like it


class GrammarTrial:
    """The process, seen from outside."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns at once, while the process gets ready. Without it the first grammar waits for that."""
        if self._process is None or self._process.poll() is not None:
            pipe, command = subprocess.PIPE, [sys.executable, "-P", __file__]
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
            weakref.finalize(self, _end, self._process)

    def check(self, field: str, source: str) -> str:
        """What is wrong with a grammar, in one line; "" if nothing is. Takes little more than CPU_S, and no
        more than TIMEOUT_S where the machine is busy.
        """
        try:
            self.start()
        except OSError as error:
            return f"the process that tries grammars cannot be started: {error.strerror}"
        assert self._process is not None, "was started"
        try:
            answer = _ask(self._process, json.dumps([field, source]).encode() + b"\n")
        except OSError:
            answer = b""
        if not answer:  # the process itself was ended; by the system, where memory is short
            self.close()
            return TOO_COSTLY
        return str(json.loads(answer))

    def close(self) -> None:
        """The next grammar starts it again."""
        if self._process is not None:
            _end(self._process)
            self._process = None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _ask(process: subprocess.Popen[bytes], question: bytes) -> bytes:
    """The line that the process answers; nothing where it has ended, or is out of reach."""
    assert process.stdin is not None and process.stdout is not None, "are pipes"
    process.stdin.write(question)
    process.stdin.flush()
    answers = select.select([process.stdout], [], [], START_S + TIMEOUT_S)[0]
    return process.stdout.readline() if answers else b""


def make_grammar(field: str, source: str) -> str:
    """In the library's own language; field and source as StructuredOutputsParams.source gives them. Raises
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


def _work() -> None:
    """Answer a line for each line of stdin, until that closes. The timers kill a try that takes too long."""
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        signal.setitimer(signal.ITIMER_REAL, TIMEOUT_S)
        error = _try(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(error), flush=True)
    os._exit(0)


def _start_work() -> NoReturn:
    """On a thread, whose stack has a known size. It does not come back where a try failed or work is done."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_work)
    thread.start()
    thread.join()
    os._exit(1)


def _keep_working() -> None:
    """Fork a process that works, and another after each that a grammar ends. One that was killed from outside
    may have had no question: then nothing is answered.
    """
    while True:
        child = os.fork()
        if child == 0:
            _start_work()
        status = os.waitpid(child, 0)[1]
        if status == 0 or os.WTERMSIG(status) == signal.SIGKILL:
            return
        print(json.dumps(TOO_COSTLY), flush=True)


if __name__ == "__main__":
    import llguidance  # noqa: F401  # before anybody asks

    _keep_working()
