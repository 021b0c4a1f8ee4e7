"""Small random checkpoints in the real Hugging Face layout, made with transformers, which is also the
oracle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_llama(folder: Path, *, seed: int = 0, **overrides: Any) -> Any:
    return make_model(folder, "llama", seed=seed, **overrides)


def make_model(folder: Path, model_type: str, *, seed: int = 0, **overrides: Any) -> Any:
    """Save transformers' causal model of that type with every parameter randomised (gains and biases too);
    return it, fp32, eval.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **(SIZES | overrides))
    # Grouped products of experts want aligned sizes; eager takes one expert after the other.
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, **eager).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Wide enough that logits spread and greedy choices are no ties; norm gains stay around 1.
            parameter.normal_(1.0, 0.2) if is_gain(name) else parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return model


def is_gain(name: str) -> bool:
    return ("norm" in name or ".ln_" in name) and name.endswith("weight")


@torch.no_grad()
def greedy_reference(model: Any, prompt: list[int], num_tokens: int, eos: int | None = None) -> list[int]:
    """Greedy continuation by transformers, without padding and without a cache."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]
