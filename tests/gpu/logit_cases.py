"""Checkpoints of every family, of odd and real shapes, what transformers makes of them, and how far off one
may be. A family without a case fails tests/unit/models/test_gpu_cases.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from distllm.models.registry import parse_config
from distllm.models.spec import DecoderSpec
from tests.checkpoints import SIZES, make_model
from tests.unit.models import oracles
from tests.unit.models.family_cases import FamilyCase
from tests.unit.models.older_cases import BAICHUAN_13B, CHATGLM, QWEN

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
WINDOW = 48  # shorter than the two longest texts
VARIANTS: dict[str, dict[str, Any]] = {  # Llama where there is no model_type
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
    "mistral-128": {
        "model_type": "mistral",
        "num_attention_heads": 4,
        "head_dim": 128,
        "sliding_window": WINDOW,
    },
    "qwen2-64": {
        "model_type": "qwen2",
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "hidden_size": 448,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3-128": {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128},
    "starcoder2-128": {
        "model_type": "starcoder2",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 512,
        "sliding_window": WINDOW,
    },
    "gemma2-256": {
        "model_type": "gemma2",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "query_pre_attn_scalar": 64,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    "gemma3-256": {
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "query_pre_attn_scalar": 64,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
    },
    "phi3-96": {
        "model_type": "phi3",
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "hidden_size": 384,
        "sliding_window": WINDOW,
        "pad_token_id": 0,
    },
    "phi4-mini-128": {  # 96 of the 128 turn
        "model_type": "phi3",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 512,
        "original_max_position_embeddings": 384,  # above all texts: the oracle decides for each text
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0 + pair / 100 for pair in range(48)],
            "long_factor": [1.0 + pair for pair in range(48)],
        },
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    },
    "glm-128": {
        "model_type": "glm",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "pad_token_id": 0,
    },
    "glm4-128": {
        "model_type": "glm4",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "pad_token_id": 0,
    },
    # RW is left out: beyond position 256 transformers rounds its alibi, in any dtype. Baichuan brings alibi.
    "falcon-64": {
        "model_type": "falcon",
        "num_attention_heads": 7,
        "hidden_size": 448,
        "tie_word_embeddings": True,
    },
    "falcon-new-64": {
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "num_attention_heads": 8,
        "num_kv_heads": 2,
        "hidden_size": 512,
    },
    "gpt2-64": {
        "model_type": "gpt2",
        "n_embd": 256,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 512,
        "tie_word_embeddings": True,
    },
    "mixtral-128": {
        "model_type": "mixtral",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 4,  # of 2, a near tie that bf16 decides otherwise changes half a layer
    },
    "qwen3-moe-128": {
        "model_type": "qwen3_moe",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 90,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
}
# What transformers has no class for.
STORED = {
    "baichuan2-128": FamilyCase(
        "llama",
        "BaichuanForCausalLM",
        {"num_attention_heads": 12, "num_key_value_heads": 12, "hidden_size": 1536},
        {
            **BASE,
            **BAICHUAN_13B,
            "num_attention_heads": 12,
            "hidden_size": 1536,
            "model_max_length": 512,
            "rms_norm_eps": 1e-6,
            "z_loss_weight": 0,
        },
        store=oracles.baichuan,
        adapt=oracles.normalize_head_and_put_alibi,
    ),
    "qwen-128": FamilyCase(
        "qwen2",
        "QWenLMHeadModel",
        {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 512},
        {
            **BASE,
            **QWEN,
            "hidden_size": 512,
            "intermediate_size": 2 * BASE["intermediate_size"],
            "kv_channels": 128,
            "layer_norm_epsilon": 1e-6,
            "seq_length": 512,
        },
        store=oracles.qwen,
    ),
    "chatglm-128": FamilyCase(
        "glm",
        "ChatGLMModel",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.5},
            "pad_token_id": 0,
        },
        {
            **CHATGLM,
            "hidden_size": BASE["hidden_size"],
            "ffn_hidden_size": BASE["intermediate_size"],
            "num_layers": BASE["num_hidden_layers"],
            "padded_vocab_size": BASE["vocab_size"],
            "kv_channels": 128,
            "layernorm_epsilon": 1.5625e-07,
            "rope_ratio": 500,
            "seq_length": 512,
        },
        store=oracles.chatglm,
    ),
}
VARIANTS |= {name: {"model_type": case.model_type, **case.options} for name, case in STORED.items()}
SEED = 5
# Run as whole prompts, chunks and decode steps (stepping.random_steps). The longest is split when it decodes.
TEXT_LENGTHS = (1, 19, 83, 300)
# Times the error of transformers, which rounds at other places than we do. TF32 would be a hundred times.
ALLOWED = {torch.bfloat16: 1.5, torch.float32: 3.0}


@dataclass(frozen=True)
class Case:
    exact: list[torch.Tensor]  # by transformers in fp64, from weights that bf16 holds exactly
    theirs: dict[torch.dtype, list[torch.Tensor]]  # by transformers in that dtype, on the device


def texts(vocab_size: int = BASE["vocab_size"]) -> list[list[int]]:
    rng = random.Random(SEED)
    return [rng.choices(range(vocab_size), k=length) for length in TEXT_LENGTHS]


@torch.no_grad()
def logits_of(
    folder: Path, dtype: torch.dtype, device: torch.device, adapt: Callable[[Any], None] | None
) -> list[torch.Tensor]:
    """Loaded in this dtype, not cast to it: a cast would round the rope frequencies too."""
    from transformers import AutoModelForCausalLM

    # eager: the others leave softcaps out, and want aligned experts
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **eager)
    model = model.to(device).eval()
    if adapt:
        adapt(model)
    return [model(torch.tensor([text], device=device)).logits[0].double().cpu() for text in texts()]


def variant(name: str) -> dict[str, Any]:
    """transformers' configuration and its model_type."""
    return {"model_type": "llama", **BASE, **VARIANTS[name]}


def spec_of(name: str) -> DecoderSpec:
    """Without weights."""
    from transformers import AutoConfig

    if name in STORED:
        return parse_config(STORED[name].hub_config())
    return parse_config(AutoConfig.for_model(**(SIZES | variant(name))).to_dict())


def make_case(folder: Path, name: str, device: torch.device) -> Case:
    options = variant(name)
    stored = STORED.get(name)
    source = folder / "transformers" if stored else folder
    model = make_model(source, options.pop("model_type"), seed=len(name), **options).bfloat16()
    model.save_pretrained(source)
    if stored and stored.store:
        stored.write(folder, stored.store(model.state_dict()))
    exact, *theirs = (
        logits_of(source, dtype, device, stored.adapt if stored else None)
        for dtype in (torch.float64, torch.bfloat16, torch.float32)
    )
    return Case(exact, {torch.bfloat16: theirs[0], torch.float32: theirs[1]})


def logits_file(folder: Path, tp: int, pp: int, dtype: torch.dtype) -> Path:
    return folder / f"logits-tp{tp}-pp{pp}-{str(dtype).removeprefix('torch.')}"


def write_logits(path: Path, logits: list[torch.Tensor]) -> None:
    """Texts are numbered in their order."""
    save_file({str(number): part for number, part in enumerate(logits)}, path)


def read_logits(path: Path) -> list[torch.Tensor]:
    parts = load_file(path)
    return [parts[str(number)] for number in range(len(parts))]


def check(case: Case, ours: list[torch.Tensor], dtype: torch.dtype, where: str) -> None:
    """Over all logits together, and the worst of them. The worst is one number of many: it may vary more."""
    found, theirs = error(ours, case.exact), error(case.theirs[dtype], case.exact)
    assert rms(found) <= ALLOWED[dtype] * rms(theirs), (
        f"{where}: rms {rms(found):.2e}, theirs {rms(theirs):.2e}"
    )
    worst, allowed = found.abs().max(), 2 * ALLOWED[dtype] * theirs.abs().max()
    assert worst <= allowed, f"{where}: worst {worst:.2e}, allowed {allowed:.2e}"


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([(a.double() - b).flatten() for a, b in zip(found, exact, strict=True)])


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())
