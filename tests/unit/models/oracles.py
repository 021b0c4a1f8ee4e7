"""Classes of transformers as references for families that it has none for: their tensors under the names and
in the layouts of those families' files, and what else has to change.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tests.checkpoints import Tensors


def published_gpt2(tensors: Tensors) -> Tensors:
    """The first files: names without `transformer.`, and a buffer for the mask."""
    found = {
        name.removeprefix("transformer."): t.clone() for name, t in tensors.items() if "lm_head" not in name
    }
    return found | {"h.0.attn.bias": torch.ones(1, 1, 8, 8).tril()}


def baichuan(tensors: Tensors) -> Tensors:
    """Of Llama's: q, k and v are thirds of one tensor."""
    return fused(tensors, "self_attn.{}_proj.weight", "self_attn.W_pack.weight")


def qwen(tensors: Tensors) -> Tensors:
    """Of Qwen2's, or Llama's with biases."""
    tensors = fused(tensors, "self_attn.{}_proj.weight", "attn.c_attn.weight")
    tensors = fused(tensors, "self_attn.{}_proj.bias", "attn.c_attn.bias")
    return {with_names(name, QWEN_NAMES): tensor for name, tensor in tensors.items()}


def chatglm(tensors: Tensors) -> Tensors:
    """Of Glm's, whose gate and up are one tensor already."""
    for kind in ("weight", "bias"):
        tensors = fused(tensors, f"self_attn.{{}}_proj.{kind}", f"self_attention.query_key_value.{kind}")
    return {with_names(name, CHATGLM_NAMES): tensor for name, tensor in tensors.items()}


QWEN_NAMES = {
    "model.embed_tokens": "transformer.wte",
    "model.layers": "transformer.h",
    "model.norm": "transformer.ln_f",
    "self_attn.o_proj": "attn.c_proj",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.w1",
    "mlp.gate_proj": "mlp.w2",
    "mlp.down_proj": "mlp.c_proj",
}


CHATGLM_NAMES = {
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.layers": "transformer.encoder.layers",
    "model.norm": "transformer.encoder.final_layernorm",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
    "lm_head": "transformer.output_layer",
}


def with_names(name: str, names: dict[str, str]) -> str:
    for theirs, own in names.items():
        name = name.replace(theirs, own)
    return name


def fused(tensors: Tensors, parts: str, whole: str) -> Tensors:
    """parts: the end of a name, with {} for q, k and v; whole: the end of what takes their place."""
    q, k, v = (parts.format(part) for part in "qkv")
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith((q, k, v))}
    for name in tensors:
        if name.endswith(q):
            stem = name.removesuffix(q)
            found[stem + whole] = torch.cat([tensors[stem + part] for part in (q, k, v)])
    return found


def normalize_head(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.copy_(F.normalize(model.lm_head.weight))


def put_alibi_for_rope(model: Any) -> None:
    """At position 0 rope turns nothing; a mask of numbers brings the bias, from Bloom's of each position."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    heads = model.config.num_attention_heads

    def bias(module: Any, args: tuple[torch.Tensor], kwargs: dict[str, Any]) -> Any:
        n, device = args[0].shape[1], args[0].device
        alibi = build_alibi_tensor(torch.ones(1, n), heads, torch.float32).view(1, heads, 1, n)
        mask = (alibi - alibi.mT).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        kwargs["attention_mask"] = mask.to(device, module.dtype)
        return args, {**kwargs, "position_ids": torch.zeros(1, n, dtype=torch.int64, device=device)}

    model.register_forward_pre_hook(bias, with_kwargs=True)


def normalize_head_and_put_alibi(model: Any) -> None:
    normalize_head(model)
    put_alibi_for_rope(model)


def add_alibi_once(model: Any) -> None:
    """Falcon's eager attention adds it twice; its layers look this up in each call."""
    model.config._attn_implementation = "sdpa"
