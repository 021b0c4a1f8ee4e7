"""From the name on a command line to a model folder, and what its JSON files say. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distllm.engine.files import find_file, inside, read_json
from distllm.engine.format import ENGINE_JSON, read_index
from distllm.errors import CheckpointError
from distllm.models.checks import check_int
from distllm.models.registry import parse_config
from distllm.models.spec import DecoderSpec

BUNDLED = ("demo", "demo-draft")
_ASSETS = Path(__file__).resolve().parent.parent / "assets"


def resolve_model(name_or_path: str | Path) -> Path:
    """The folder of a model: a bundled name (`demo`; write `./demo` for a folder of that name) or a path."""
    if str(name_or_path) in BUNDLED:
        return _ASSETS / str(name_or_path)
    path = Path(name_or_path)
    try:
        names = {entry.name for entry in path.iterdir()}
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"cannot open the model folder {str(path)!r}: {reason}; "
            f"give a folder with config.json or engine.json, or one of {', '.join(BUNDLED)}"
        ) from error
    if not names & {"config.json", ENGINE_JSON}:
        raise CheckpointError(f"{path} holds neither config.json nor engine.json, so it is no model folder")
    return path


def is_engine(path: Path) -> bool:
    return (path / ENGINE_JSON).exists()


def read_spec(path: Path) -> DecoderSpec:
    """The spec of a model folder or an engine."""
    if is_engine(path):
        return read_index(path).spec
    file = inside(path, "config.json")
    config = read_json(file)
    try:
        return parse_config(config)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def eos_token_ids(path: Path) -> tuple[int, ...]:
    """The ids that end a text: generation_config.json's and the config's, ascending."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json", ENGINE_JSON):
        if file := find_file(path, name):
            ids.update(_ids(file, read_json(file).get("eos_token_id")))
    return tuple(sorted(ids))


def read_generation_config(path: Path) -> dict[str, Any]:
    """What generation_config.json says; nothing where there is none."""
    file = find_file(path, "generation_config.json")
    return read_json(file) if file else {}


def _ids(path: Path, value: Any) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        check_int(f"{path}: eos_token_id", token_id, 0, 2**31 - 1)
    return ids
