"""GPT-2, whose weights are stored [in, out]. The published files have no `transformer.` before names."""

from __future__ import annotations

from distllm.models.sources import QKV, Layout, Stored, stacked_qkv


def _named(name: str) -> Stored:
    return Stored((f"transformer.{name}", name))


def _conv1d(name: str, layout: Layout | None = None) -> Stored:
    return Stored((f"transformer.{name}", name), layout, transposed=True)


SLOTS = {
    "embed": _named("wte"),
    "positions": _named("wpe"),
    "layers.{n}.attn_norm": _named("h.{n}.ln_1"),
    **dict.fromkeys(QKV, _conv1d("h.{n}.attn.c_attn", stacked_qkv)),
    "layers.{n}.attn.o": _conv1d("h.{n}.attn.c_proj"),
    "layers.{n}.mlp_norm": _named("h.{n}.ln_2"),
    "layers.{n}.mlp.up": _conv1d("h.{n}.mlp.c_fc"),
    "layers.{n}.mlp.down": _conv1d("h.{n}.mlp.c_proj"),
    "final_norm": _named("ln_f"),
    "head": "lm_head",
}
