"""Llama checkpoints of odd and real shapes, what transformers makes of them, and how far off one may be."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_llama

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BASE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 344,
    "num_hidden_layers": 3,
    "vocab_size": 1031,
    "max_position_embeddings": 512,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa-64": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "mha-128": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128},
    "llama3-128": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rope_parameters": LLAMA3_SCALING,
    },
    "tied-32": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_parameters": LLAMA3_SCALING,
        "tie_word_embeddings": True,
    },
    "odd-80": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 80,
        "hidden_size": 204,
        "intermediate_size": 302,
    },
    "biases-96": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 96,
        "hidden_size": 252,
        "attention_bias": True,
        "mlp_bias": True,
    },
}
SEED = 5
# Run as whole prompts, chunks and decode steps (stepping.random_steps). The longest is split when it decodes.
TEXT_LENGTHS = (1, 19, 83, 300)
# Times the error of transformers, which rounds at other places than we do. TF32 would be a hundred times.
ALLOWED = {torch.bfloat16: 1.5, torch.float32: 3.0}


@dataclass(frozen=True)
class Case:
    folder: Path
    exact: list[torch.Tensor]  # by transformers in fp64, from weights that bf16 holds exactly
    theirs: dict[torch.dtype, list[torch.Tensor]]  # by transformers in that dtype, on the device


def texts(vocab_size: int = BASE["vocab_size"]) -> list[list[int]]:
    rng = random.Random(SEED)
    return [rng.choices(range(vocab_size), k=length) for length in TEXT_LENGTHS]


@torch.no_grad()
def logits_of(folder: Path, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Loaded in this dtype, not cast to it: a cast would round the rope frequencies too."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return [model(torch.tensor([text], device=device)).logits[0].double().cpu() for text in texts()]


def make_case(folder: Path, name: str, device: torch.device) -> Case:
    make_llama(folder, seed=len(name), **(BASE | VARIANTS[name])).bfloat16().save_pretrained(folder)
    theirs = {dtype: logits_of(folder, dtype, device) for dtype in (torch.bfloat16, torch.float32)}
    return Case(folder, logits_of(folder, torch.float64, device), theirs)


def logits_file(folder: Path, tp: int, pp: int, dtype: torch.dtype) -> Path:
    return folder / f"logits-tp{tp}-pp{pp}-{str(dtype).removeprefix('torch.')}"


def write_logits(path: Path, logits: list[torch.Tensor]) -> None:
    """Texts are numbered in their order."""
    save_file({str(number): part for number, part in enumerate(logits)}, path)


def read_logits(path: Path) -> list[torch.Tensor]:
    parts = load_file(path)
    return [parts[str(number)] for number in range(len(parts))]


def check(case: Case, ours: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Over all logits together, and the worst of them. The worst is one number of many: it may vary more."""
    found, theirs = error(ours, case.exact), error(case.theirs[dtype], case.exact)
    assert rms(found) <= ALLOWED[dtype] * rms(theirs), (
        f"{case.folder.name}: rms {rms(found):.2e}, theirs {rms(theirs):.2e}"
    )
    worst, allowed = found.abs().max(), 2 * ALLOWED[dtype] * theirs.abs().max()
    assert worst <= allowed, f"{case.folder.name}: worst {worst:.2e}, allowed {allowed:.2e}"


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([(a.double() - b).flatten() for a, b in zip(found, exact, strict=True)])


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())
