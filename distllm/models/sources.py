"""Where a slot lies in a checkpoint: in which tensor, which of its rows, which way round. Pure arithmetic on
a spec's numbers: no file, no torch, no rank.

Families say it per slot (`Stored`) and per fused tensor (a `Layout`); the loader asks a `Source` for rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from distllm.models.spec import DecoderSpec
from distllm.parallel.sharding import Span

QKV = ("layers.{n}.attn.q", "layers.{n}.attn.k", "layers.{n}.attn.v")
GATE_UP = ("layers.{n}.mlp.gate", "layers.{n}.mlp.up")


@dataclass(frozen=True)
class Fusion:
    """The rows of a fused tensor: num_groups times the same parts, each with so many rows, in this order."""

    num_groups: int
    parts: dict[str, int]  # a slot's last name (q, k, v, gate, up) → its rows in one group

    @property
    def num_rows(self) -> int:
        return self.num_groups * sum(self.parts.values())

    def spans(self, part: str) -> tuple[Span, ...]:
        """The rows of one part, group by group."""
        names = list(self.parts)
        first = sum(self.parts[name] for name in names[: names.index(part)])
        size, step = self.parts[part], sum(self.parts.values())
        starts = [first + group * step for group in range(self.num_groups)]
        return tuple((start, start + size) for start in starts)


Layout = Callable[[DecoderSpec], Fusion]


def stacked_qkv(spec: DecoderSpec) -> Fusion:
    """All q heads, all k heads, all v heads."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return Fusion(1, {"q": q, "k": kv, "v": kv})


def grouped_qkv(spec: DecoderSpec) -> Fusion:
    """For each KV head the q heads that read it, its k, its v.

    With one KV head that is all q heads, k, v; with as many as q heads it is [q, k, v] per head.
    """
    q = spec.num_heads // spec.num_kv_heads * spec.head_dim
    return Fusion(spec.num_kv_heads, {"q": q, "k": spec.head_dim, "v": spec.head_dim})


def gate_up(spec: DecoderSpec) -> Fusion:
    """The gate, then what it gates."""
    return Fusion(1, {"gate": spec.intermediate_size, "up": spec.intermediate_size})


@dataclass(frozen=True)
class Stored:
    """How a family's checkpoints store a slot; names are without `.weight` and `.bias`."""

    names: tuple[str, ...]  # files differ: the first of these that is there
    layout: Layout | None = None  # of the fused tensor whose part the slot is
    transposed: bool = False  # weights are [in, out]


@dataclass(frozen=True)
class Source:
    """The rows of one tensor that, joined in order, are a slot's rows; of a transposed one, its columns."""

    names: tuple[str, ...]  # the first of these that is there
    shape: tuple[int, ...]  # of the whole tensor as it is stored
    slot_shape: tuple[int, ...]
    spans: tuple[Span, ...]
    transposed: bool

    def locate(self, start: int, stop: int) -> Iterator[tuple[Span, int]]:
        """Where rows [start, stop) of the slot are stored, and how far behind `start` each span begins."""
        row = 0  # of the slot
        for first, last in self.spans:
            low, high = max(start, row), min(stop, row + last - first)
            if low < high:
                yield (first + low - row, first + high - row), low - start
            row += last - first


def make_source(
    stored: Stored, names: tuple[str, ...], part: str, spec: DecoderSpec, slot_shape: tuple[int, ...]
) -> Source:
    """names: in full, for this slot. part: which one it is of a fused tensor."""
    rows = slot_shape[0]
    fusion = stored.layout(spec) if stored.layout else Fusion(1, {part: rows})
    spans = fusion.spans(part)
    assert sum(stop - start for start, stop in spans) == rows, f"{names[0]}: {part} has not {rows} rows"
    transposed = stored.transposed and len(slot_shape) == 2
    shape = (fusion.num_rows, *slot_shape[1:])
    return Source(names, shape[::-1] if transposed else shape, slot_shape, spans, transposed)
