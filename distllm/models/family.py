"""A family of models: how its config.json becomes a DecoderSpec, and what its checkpoints call each slot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distllm.models.spec import DecoderSpec


@dataclass(frozen=True)
class Family:
    """slots maps a slot without its `.weight` or `.bias` to the checkpoint's name; {n} is the layer."""

    name: str
    architectures: tuple[str, ...]  # of config.json
    read_config: Callable[[dict[str, Any]], DecoderSpec]
    slots: dict[str, str]

    def tensor_name(self, slot: str) -> str:
        """The checkpoint's name of `layers.3.attn.q.weight` and the like."""
        stem, kind = slot.rsplit(".", 1)
        if stem in self.slots:
            return f"{self.slots[stem]}.{kind}"
        _, layer, rest = stem.split(".", 2)
        return f"{self.slots['layers.{n}.' + rest].format(n=layer)}.{kind}"
