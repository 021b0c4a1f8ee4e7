"""The directions of imports, and what no file may do, read from the source of the whole package."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2] / "distllm"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room imports from rooms of a smaller number, and from itself. The leaves know nothing but errors.
LEVELS = {
    "errors": 0,
    "config": 1,
    "env": 1,
    "comm": 2,
    "kernels": 2,
    "parallel": 3,
    "quantization": 4,
    "models": 4,
    "engine": 5,
    "runtime": 6,
    "serve": 7,
    "batch": 7,
    "ops": 7,
    "cli": 8,
}
ONLY_IMPORTER = {"mpi4py": "comm/mpi.py", "nccl": "comm/nccl.py", "nccl4py": "comm/nccl.py"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "__import__"}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def walk_running(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that can run: all but the bodies of `if TYPE_CHECKING`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            yield from walk_running(child)


def imported(source: str) -> list[str]:
    """Dotted names that a source imports; `from a import b` counts as a.b."""
    names = []
    for node in walk_running(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import; write the full name"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def forbidden_direction(room: str, name: str) -> bool:
    """May a file of this room not import this dotted name? Names of the package root are on top."""
    parts = name.split(".")
    if parts[0] != "distllm" or parts[1:] == ["__version__"]:
        return False
    return parts[1] != room and LEVELS.get(parts[1], 9) >= LEVELS[room]


def unsafe(source: str) -> list[str]:
    """What could run code found in data, or read the environment."""
    found = [name for name in imported(source) if name.split(".")[0] in UNSAFE_MODULES]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in UNSAFE_CALLS:
            found.append(node.func.id)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.jit.load"):
            found.append(ast.unparse(node))
    return found


def reads_environment(source: str) -> bool:
    names = {"os.environ", "os.getenv", "os.environb", "os.putenv"}
    attributes = {ast.unparse(n) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)}
    return bool(names & (attributes | set(imported(source))))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


ROOM_FILES = [path for path in FILES if room_of(path) in LEVELS]


def offenders(find: Callable[[Path], Any], files: list[Path] = FILES) -> dict[str, Any]:
    """What a check finds wrong, by file; empty if nothing."""
    return {relative(path): found for path in files if (found := find(path))}


def test_every_room_has_a_level() -> None:
    assert {room_of(path) for path in FILES} - {"__init__", "__main__"} <= LEVELS.keys()
    assert len(ROOM_FILES) > 20


def test_imports_go_down() -> None:
    def upward(path: Path) -> list[str]:
        return [name for name in imported(path.read_text()) if forbidden_direction(room_of(path), name)]

    assert not offenders(upward, ROOM_FILES)


def test_one_importer_each() -> None:
    def foreign(path: Path) -> list[str]:
        tops = {name.split(".")[0] for name in imported(path.read_text())}
        return [top for top in tops if ONLY_IMPORTER.get(top, relative(path)) != relative(path)]

    assert not offenders(foreign)


def test_weights_are_data() -> None:
    assert not offenders(lambda path: unsafe(path.read_text()))


def test_only_env_reads_the_environment() -> None:
    assert list(offenders(lambda path: reads_environment(path.read_text()))) == ["env.py"]


def test_no_drawer_for_everything() -> None:
    assert not offenders(lambda path: path.stem in ("utils", "util", "helpers", "helper", "misc", "common"))


def test_the_checks_can_fail() -> None:
    assert forbidden_direction("comm", "distllm.runtime.plan.StepPlan")
    assert forbidden_direction("env", "distllm.config.EngineConfig")
    assert not forbidden_direction("engine", "distllm.models.spec.DecoderSpec")
    assert imported("def f():\n    from distllm.cli import main") == ["distllm.cli.main"]
    assert imported("if TYPE_CHECKING:\n    import mpi4py") == []
    assert unsafe("import pickle") and unsafe("x = torch.load(p)") and unsafe("eval(s)")
    assert not unsafe("model.eval()")
    assert reads_environment("from os import environ") and reads_environment("os.environ['A']")
