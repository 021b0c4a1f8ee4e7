"""A family of models: how its config.json becomes a DecoderSpec, and where its checkpoints keep each slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distllm.models.sources import Source, Stored, make_source
from distllm.models.spec import DecoderSpec

INDICES = ("{n}", "{e}")  # the numbers in a slot's name: its layer, its expert


@dataclass(frozen=True)
class Family:
    """slots maps a slot without its `.weight` or `.bias` to the checkpoint's name, or to how it is stored.

    {n} is the layer and {e} the expert: `layers.{n}.moe.experts.{e}.up`.
    """

    name: str
    architectures: tuple[str, ...]  # of config.json
    read_config: Callable[[dict[str, Any]], DecoderSpec]
    slots: Mapping[str, str | Stored]
    models: str = ""  # that were released with it, and their sizes: for people, by `distllm models`
    notes: str = ""  # what they should know of it

    def source(self, spec: DecoderSpec, slot: str, shape: tuple[int, ...]) -> Source:
        """Where a checkpoint keeps `layers.3.attn.q.weight` and the like; shape is the whole slot's."""
        stem, kind = slot.rsplit(".", 1)
        pattern, indices = _pattern(stem)
        entry = self.slots[pattern]
        stored = Stored((entry,)) if isinstance(entry, str) else entry
        names = tuple(f"{name.format(**indices)}.{kind}" for name in stored.names)
        return make_source(stored, names, stem.rsplit(".", 1)[-1], spec, shape)


def _pattern(stem: str) -> tuple[str, dict[str, str]]:
    """`layers.3.attn.q` as `layers.{n}.attn.q` and {"n": "3"}."""
    words = stem.split(".")
    places = [place for place, word in enumerate(words) if word.isdecimal()]
    indices = {}
    for place, index in zip(places, INDICES, strict=False):
        indices[index[1:-1]], words[place] = words[place], index
    return ".".join(words), indices
