"""The families that distllm runs. A new family is one file and one entry here."""

from __future__ import annotations

from typing import Any

from distllm.errors import CheckpointError
from distllm.models.family import Family
from distllm.models.llama import LLAMA
from distllm.models.spec import DecoderSpec

FAMILIES = (LLAMA,)


def find_family(config: dict[str, Any]) -> Family:
    """The family of a config.json, by `architectures`; without them, by `model_type`."""
    architectures = config.get("architectures")
    if not architectures:
        return family_named(config.get("model_type"))
    for family in FAMILIES:
        if isinstance(architectures, list) and architectures[0] in family.architectures:
            return family
    raise _unknown(f"architectures {architectures!r}")


def family_named(name: object) -> Family:
    """The family of a spec."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise _unknown(f"model_type {name!r}")


def parse_config(config: dict[str, Any]) -> DecoderSpec:
    """The spec of a config.json. Raises CheckpointError for whatever is not implemented exactly."""
    return find_family(config).read_config(config)


def _unknown(what: str) -> CheckpointError:
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    return CheckpointError(f"{what} is not supported; supported: {known}")
