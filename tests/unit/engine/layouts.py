"""Small checkpoints in every layout that families have, as transformers makes them or, where it has no class,
by hand; and where their slots are, by views of whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from distllm.models import baichuan, chatglm, falcon, glm, gpt2, phi3, qwen
from distllm.models.sources import Stored

HEADS, HEAD_DIM, HIDDEN, WIDTH, VOCAB, LAYERS = 8, 6, 48, 37, 41, 2
Tensors = dict[str, torch.Tensor]


# The parts of fused tensors, by views and splits of the whole tensor.


def thirds(w: torch.Tensor, kv: int) -> list[torch.Tensor]:
    """q | k | v."""
    return list(w.split([HEADS * HEAD_DIM, kv * HEAD_DIM, kv * HEAD_DIM]))


def groups(w: torch.Tensor, kv: int) -> list[torch.Tensor]:
    """(q … q, k, v) per KV head."""
    g = w.view(kv, HEADS // kv + 2, HEAD_DIM, *w.shape[1:])
    return [part.flatten(0, 2) for part in (g[:, :-2], g[:, -2:-1], g[:, -1:])]


def multi_query(w: torch.Tensor, kv: int) -> list[torch.Tensor]:
    """All q heads, then the only k, then the only v."""
    assert kv == 1
    return [w[: -2 * HEAD_DIM], w[-2 * HEAD_DIM : -HEAD_DIM], w[-HEAD_DIM:]]


def per_head(w: torch.Tensor, kv: int) -> list[torch.Tensor]:
    """q, k, v of the first head, of the second, …"""
    assert kv == HEADS
    return [w.view(HEADS, 3, HEAD_DIM, *w.shape[1:])[:, part].flatten(0, 1) for part in range(3)]


@dataclass
class Case:
    """A checkpoint and how to find its parts. make(kv_heads) gives the architecture and all tensors."""

    slots: Mapping[str, str | Stored]
    make: Callable[[int], tuple[str, Tensors]]
    kv: int
    rest: dict[str, str]  # slot → name, of those that are stored alone
    qkv: tuple[str, Callable[[torch.Tensor, int], list[torch.Tensor]]] | None = None
    gate_up: str | None = None
    transposed: bool = False
    dtype: torch.dtype = torch.float32

    def slots_of(self, tensors: Tensors) -> Tensors:
        """Every slot, whole, in fp32."""
        found = {slot: tensors[name] for slot, name in _each_layer(self.rest).items()}
        if self.transposed:
            turned = ("attn.o.weight", "mlp.up.weight", "mlp.down.weight")
            found = {slot: t.T if slot.endswith(turned) else t for slot, t in found.items()}
        for n in range(LAYERS):
            found |= self._fused(tensors, n)
        return {slot: tensor.float() for slot, tensor in found.items()}

    def _fused(self, tensors: Tensors, n: int) -> Tensors:
        found = {}
        for kind in ("weight", "bias"):
            name = self.qkv and f"{self.qkv[0].format(n=n)}.{kind}"
            if self.qkv and name in tensors:
                whole = tensors[name].mT if self.transposed and kind == "weight" else tensors[name]
                for part, values in zip("qkv", self.qkv[1](whole.contiguous(), self.kv), strict=True):
                    found[f"layers.{n}.attn.{part}.{kind}"] = values
            name = self.gate_up and f"{self.gate_up.format(n=n)}.{kind}"
            if name in tensors:
                for part, values in zip(("gate", "up"), tensors[name].chunk(2), strict=True):
                    found[f"layers.{n}.mlp.{part}.{kind}"] = values
        return found


def _each_layer(names: dict[str, str]) -> dict[str, str]:
    return {slot.format(n=n): name.format(n=n) for n in range(LAYERS) for slot, name in names.items()}


def transformer(name: str, config: str, **options: Any) -> Callable[[int], tuple[str, Tensors]]:
    def make(kv: int) -> tuple[str, Tensors]:
        import transformers

        model = getattr(transformers, name)(getattr(transformers, config)(**options))
        with TemporaryDirectory() as folder:  # names in files are not always those in memory
            model.save_pretrained(folder)
            return name, load_file(f"{folder}/model.safetensors")

    return make


def by_hand(architecture: str, shapes: dict[str, tuple[int, ...]]) -> Callable[[int], tuple[str, Tensors]]:
    """{n} stands for each layer."""

    def make(kv: int) -> tuple[str, Tensors]:
        names = {name.format(n=n): shape for n in range(LAYERS) for name, shape in shapes.items()}
        return architecture, {name: torch.empty(shape) for name, shape in names.items()}

    return make


def both(slot: str, name: str) -> dict[str, str]:
    return {f"{slot}.{kind}": f"{name}.{kind}" for kind in ("weight", "bias")}


LLAMA_LIKE = {
    "embed.weight": "model.embed_tokens.weight",
    "layers.{n}.attn_norm.weight": "model.layers.{n}.input_layernorm.weight",
    "layers.{n}.attn.o.weight": "model.layers.{n}.self_attn.o_proj.weight",
    "layers.{n}.mlp_norm.weight": "model.layers.{n}.post_attention_layernorm.weight",
    "layers.{n}.mlp.down.weight": "model.layers.{n}.mlp.down_proj.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
H, ROWS = "transformer.h.{n}.", HEADS * HEAD_DIM


def falcon_like(attn_norm: str, mlp_norm: str | None, bias: bool, tied: bool = False) -> dict[str, str]:
    a = both if bias else lambda slot, name: {f"{slot}.weight": f"{name}.weight"}
    return {
        "embed.weight": "transformer.word_embeddings.weight",
        **both("layers.{n}.attn_norm", H + attn_norm),
        **(both("layers.{n}.mlp_norm", H + mlp_norm) if mlp_norm else {}),
        **a("layers.{n}.attn.o", H + "self_attention.dense"),
        **a("layers.{n}.mlp.up", H + "mlp.dense_h_to_4h"),
        **a("layers.{n}.mlp.down", H + "mlp.dense_4h_to_h"),
        **both("final_norm", "transformer.ln_f"),
        **({} if tied else {"head.weight": "lm_head.weight"}),
    }


def make_falcon(**options: Any) -> Callable[[int], tuple[str, Tensors]]:
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    return transformer(
        "FalconForCausalLM", "FalconConfig", **sizes, vocab_size=VOCAB, ffn_hidden_size=WIDTH, **options
    )


SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "intermediate_size": WIDTH,
    "pad_token_id": 0,
}
FUSED = H + "self_attention.query_key_value"
GLM_LAYER = "transformer.encoder.layers.{n}."
NEW = {"new_decoder_architecture": True, "bias": False, "tie_word_embeddings": False}
CASES = {
    "phi3": Case(
        phi3.PHI3.slots,
        transformer("Phi3ForCausalLM", "Phi3Config", **SIZES, num_key_value_heads=2),
        kv=2,
        rest=LLAMA_LIKE,
        qkv=("model.layers.{n}.self_attn.qkv_proj", thirds),
        gate_up="model.layers.{n}.mlp.gate_up_proj",
        dtype=torch.bfloat16,
    ),
    "glm": Case(
        glm.SLOTS,
        transformer(
            "Glm4ForCausalLM",
            "Glm4Config",
            **SIZES,
            num_key_value_heads=4,
            head_dim=HEAD_DIM,
            attention_bias=True,
        ),
        kv=4,
        rest=LLAMA_LIKE
        | both("layers.{n}.attn.q", "model.layers.{n}.self_attn.q_proj")
        | both("layers.{n}.attn.k", "model.layers.{n}.self_attn.k_proj")
        | both("layers.{n}.attn.v", "model.layers.{n}.self_attn.v_proj")
        | {"layers.{n}.attn_post_norm.weight": "model.layers.{n}.post_self_attn_layernorm.weight"}
        | {"layers.{n}.mlp_post_norm.weight": "model.layers.{n}.post_mlp_layernorm.weight"},
        gate_up="model.layers.{n}.mlp.gate_up_proj",
    ),
    "falcon 7b": Case(
        falcon.SLOTS,
        make_falcon(multi_query=True, parallel_attn=True, bias=False, tie_word_embeddings=True),
        kv=1,
        rest=falcon_like("input_layernorm", None, bias=False, tied=True),
        qkv=(FUSED, multi_query),
        dtype=torch.bfloat16,
    ),
    "falcon 40b": Case(
        falcon.SLOTS,
        make_falcon(num_kv_heads=2, **NEW),
        kv=2,
        rest=falcon_like("ln_attn", "ln_mlp", bias=False),
        qkv=(FUSED, groups),
    ),
    "falcon 11b": Case(
        falcon.SLOTS,
        make_falcon(num_kv_heads=4, num_ln_in_parallel_attn=1, **NEW),
        kv=4,
        rest=falcon_like("input_layernorm", None, bias=False),
        qkv=(FUSED, groups),
        dtype=torch.float16,
    ),
    "falcon rw": Case(
        falcon.SLOTS,
        make_falcon(multi_query=False, parallel_attn=False, alibi=True, bias=True, tie_word_embeddings=True),
        kv=HEADS,
        rest=falcon_like("input_layernorm", "post_attention_layernorm", bias=True, tied=True),
        qkv=(FUSED, per_head),
    ),
    "bloom": Case(  # as Falcon RW, with biases
        falcon.SLOTS,
        transformer(
            "BloomForCausalLM",
            "BloomConfig",
            hidden_size=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            vocab_size=VOCAB,
        ),
        kv=HEADS,
        rest=falcon_like("input_layernorm", "post_attention_layernorm", bias=True, tied=True),
        qkv=(FUSED, per_head),
    ),
    "gpt2": Case(
        gpt2.SLOTS,
        transformer(
            "GPT2LMHeadModel",
            "GPT2Config",
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_inner=WIDTH,
            vocab_size=VOCAB,
            n_positions=23,
        ),
        kv=HEADS,
        rest={
            "embed.weight": "transformer.wte.weight",
            "positions.weight": "transformer.wpe.weight",
            **both("layers.{n}.attn_norm", H + "ln_1"),
            **both("layers.{n}.mlp_norm", H + "ln_2"),
            **both("layers.{n}.attn.o", H + "attn.c_proj"),
            **both("layers.{n}.mlp.up", H + "mlp.c_fc"),
            **both("layers.{n}.mlp.down", H + "mlp.c_proj"),
            **both("final_norm", "transformer.ln_f"),
        },
        qkv=(H + "attn.c_attn", thirds),
        transposed=True,
        dtype=torch.float16,
    ),
    "chatglm": Case(
        chatglm.CHATGLM.slots,
        by_hand(
            "ChatGLMModel",
            {
                "transformer.embedding.word_embeddings.weight": (VOCAB, HIDDEN),
                GLM_LAYER + "input_layernorm.weight": (HIDDEN,),
                GLM_LAYER + "self_attention.query_key_value.weight": (ROWS + 4 * HEAD_DIM, HIDDEN),
                GLM_LAYER + "self_attention.query_key_value.bias": (ROWS + 4 * HEAD_DIM,),
                GLM_LAYER + "self_attention.dense.weight": (HIDDEN, ROWS),
                GLM_LAYER + "post_attention_layernorm.weight": (HIDDEN,),
                GLM_LAYER + "mlp.dense_h_to_4h.weight": (2 * WIDTH, HIDDEN),
                GLM_LAYER + "mlp.dense_4h_to_h.weight": (HIDDEN, WIDTH),
                "transformer.encoder.final_layernorm.weight": (HIDDEN,),
                "transformer.output_layer.weight": (VOCAB, HIDDEN),
                "transformer.rotary_pos_emb.inv_freq": (3,),
            },
        ),
        kv=2,
        rest={
            "embed.weight": "transformer.embedding.word_embeddings.weight",
            "layers.{n}.attn_norm.weight": GLM_LAYER + "input_layernorm.weight",
            "layers.{n}.attn.o.weight": GLM_LAYER + "self_attention.dense.weight",
            "layers.{n}.mlp_norm.weight": GLM_LAYER + "post_attention_layernorm.weight",
            "layers.{n}.mlp.down.weight": GLM_LAYER + "mlp.dense_4h_to_h.weight",
            "final_norm.weight": "transformer.encoder.final_layernorm.weight",
            "head.weight": "transformer.output_layer.weight",
        },
        qkv=(GLM_LAYER + "self_attention.query_key_value", thirds),
        gate_up=GLM_LAYER + "mlp.dense_h_to_4h",
        dtype=torch.float16,
    ),
    "baichuan": Case(
        baichuan.SLOTS,
        by_hand(
            "BaichuanForCausalLM",
            {
                "model.embed_tokens.weight": (VOCAB, HIDDEN),
                "model.layers.{n}.input_layernorm.weight": (HIDDEN,),
                "model.layers.{n}.self_attn.W_pack.weight": (3 * ROWS, HIDDEN),
                "model.layers.{n}.self_attn.o_proj.weight": (HIDDEN, ROWS),
                "model.layers.{n}.self_attn.rotary_emb.inv_freq": (3,),
                "model.layers.{n}.post_attention_layernorm.weight": (HIDDEN,),
                "model.layers.{n}.mlp.gate_proj.weight": (WIDTH, HIDDEN),
                "model.layers.{n}.mlp.up_proj.weight": (WIDTH, HIDDEN),
                "model.layers.{n}.mlp.down_proj.weight": (HIDDEN, WIDTH),
                "model.norm.weight": (HIDDEN,),
                "lm_head.weight": (VOCAB, HIDDEN),
            },
        ),
        kv=HEADS,
        rest={
            **LLAMA_LIKE,
            "layers.{n}.mlp.gate.weight": "model.layers.{n}.mlp.gate_proj.weight",
            "layers.{n}.mlp.up.weight": "model.layers.{n}.mlp.up_proj.weight",
        },
        qkv=("model.layers.{n}.self_attn.W_pack", thirds),
        dtype=torch.bfloat16,
    ),
    "qwen": Case(
        qwen.SLOTS,
        by_hand(
            "QWenLMHeadModel",
            {
                "transformer.wte.weight": (VOCAB, HIDDEN),
                H + "ln_1.weight": (HIDDEN,),
                H + "attn.c_attn.weight": (3 * ROWS, HIDDEN),
                H + "attn.c_attn.bias": (3 * ROWS,),
                H + "attn.c_proj.weight": (HIDDEN, ROWS),
                H + "ln_2.weight": (HIDDEN,),
                H + "mlp.w1.weight": (WIDTH, HIDDEN),
                H + "mlp.w2.weight": (WIDTH, HIDDEN),
                H + "mlp.c_proj.weight": (HIDDEN, WIDTH),
                "transformer.ln_f.weight": (HIDDEN,),
                "lm_head.weight": (VOCAB, HIDDEN),
            },
        ),
        kv=HEADS,
        rest={
            "embed.weight": "transformer.wte.weight",
            "layers.{n}.attn_norm.weight": H + "ln_1.weight",
            "layers.{n}.attn.o.weight": H + "attn.c_proj.weight",
            "layers.{n}.mlp_norm.weight": H + "ln_2.weight",
            "layers.{n}.mlp.up.weight": H + "mlp.w1.weight",
            "layers.{n}.mlp.gate.weight": H + "mlp.w2.weight",
            "layers.{n}.mlp.down.weight": H + "mlp.c_proj.weight",
            "final_norm.weight": "transformer.ln_f.weight",
            "head.weight": "lm_head.weight",
        },
        qkv=(H + "attn.c_attn", thirds),
    ),
}
