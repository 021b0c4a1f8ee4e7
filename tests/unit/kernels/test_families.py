"""The knobs of attention and rope against the families that they are for, as transformers writes them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import BloomConfig
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.models.bloom import modeling_bloom as bloom
from transformers.models.falcon import modeling_falcon as falcon
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm import modeling_glm as glm
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.gptj import modeling_gptj as gptj
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from distllm.kernels import paged_attention, rope_and_cache_kv, rope_cos_sin
from distllm.kernels.batch import TokenBatch
from distllm.kernels.reference.rope import QKNorm


def whole_prompt(num_tokens: int) -> TokenBatch:
    """One row from position 0 on, in one block."""
    positions = torch.arange(num_tokens)
    return TokenBatch(
        positions=positions,
        slot_mapping=positions,
        cu_seqlens_q=torch.tensor([0, num_tokens], dtype=torch.int32),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32),
        block_table=torch.zeros(1, 1, dtype=torch.int32),
        num_decodes=0,
    )


def cache_of(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """keys, values: [1, kv_heads, num_tokens, head_dim], as transformers has them. One block."""
    return torch.stack((keys, values)).transpose(2, 3)


@pytest.mark.parametrize("window", [1, 4, 9, 30])
def test_softcap_and_window_of_gemma2(window: int) -> None:
    torch.manual_seed(window)
    n, heads, kv_heads, dim, scale = 17, 6, 2, 10, 0.4
    q = torch.randn(1, heads, n, dim) * 3
    keys, values = torch.randn(1, kv_heads, n, dim) * 3, torch.randn(1, kv_heads, n, dim)
    at = torch.arange(n)
    seen = sliding_window_causal_mask_function(window)(0, 0, at[:, None], at)
    mask = torch.zeros(n, n).masked_fill_(~seen, -torch.inf)
    module = SimpleNamespace(num_key_value_groups=heads // kv_heads, training=False)
    wanted = gemma2.eager_attention_forward(module, q, keys, values, mask, scaling=scale, softcap=5.0)[0]
    found = paged_attention(
        q[0].transpose(0, 1), cache_of(keys, values), whole_prompt(n), scale, window=window, softcap=5.0
    )
    torch.testing.assert_close(found, wanted[0].flatten(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 4, 7, 12])
def test_alibi_of_bloom(heads: int) -> None:
    torch.manual_seed(heads)
    n, dim = 11, 6
    module = bloom.BloomAttention(BloomConfig(n_head=heads, hidden_size=heads * dim), layer_idx=0).eval()
    hidden = torch.randn(1, n, heads * dim)
    alibi = bloom.build_alibi_tensor(torch.ones(1, n), heads, torch.float32)
    with torch.inference_mode():
        torch.nn.init.normal_(module.query_key_value.weight)
        module.dense.weight.copy_(torch.eye(heads * dim))
        module.dense.bias.zero_()
        mask = torch.zeros(1, 1, n, n).masked_fill_(torch.ones(n, n).triu(1).bool(), -torch.inf)
        wanted = module(hidden, torch.zeros_like(hidden), alibi, mask)[0]
        q, keys, values = module._reshape(module.query_key_value(hidden))
        slopes = alibi[:, 0, 1]  # the bias of position 1
        cache = cache_of(keys, values)
        found = paged_attention(q[0].transpose(0, 1), cache, whole_prompt(n), dim**-0.5, alibi_slopes=slopes)
    torch.testing.assert_close(found, wanted[0], atol=1e-5, rtol=1e-5)


def test_alibi_of_falcon_is_scaled_with_the_scores() -> None:
    """(q kᵀ + bias) · scale: the slopes of such a family are given times scale."""
    torch.manual_seed(0)
    n, heads, dim = 9, 6, 8
    q, keys, values = (torch.randn(1, heads, n, dim) for _ in range(3))
    alibi = falcon.build_alibi_tensor(torch.ones(1, n, dtype=torch.int64), heads, torch.float32)
    mask = torch.zeros(n, n).masked_fill_(torch.ones(n, n).triu(1).bool(), -torch.inf)
    scores = (q @ keys.mT + alibi.view(1, heads, 1, n)) * dim**-0.5
    wanted = ((scores + mask).softmax(-1) @ values).transpose(1, 2).flatten(2)[0]
    slopes = alibi[:, 0, 1] * dim**-0.5
    cache = cache_of(keys, values)
    found = paged_attention(q[0].transpose(0, 1), cache, whole_prompt(n), dim**-0.5, alibi_slopes=slopes)
    torch.testing.assert_close(found, wanted, atol=1e-2, rtol=0)  # transformers rounds the bias to bf16


N, HEADS, KV_HEADS, DIM = 7, 6, 2, 32


def run_rope(
    qkv: torch.Tensor, cos_sin: torch.Tensor, qk_norm: QKNorm | None = None, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k, [N, heads, DIM] each."""
    cache = torch.zeros(2, 1, N, KV_HEADS, DIM, dtype=qkv.dtype)
    heads = (HEADS, KV_HEADS, DIM)
    q = rope_and_cache_kv(
        qkv.flatten(1), cos_sin, whole_prompt(N), cache, *heads, qk_norm=qk_norm, interleaved=interleaved
    )
    return q, cache[0, 0]


def random_qkv(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(N, HEADS + 2 * KV_HEADS, DIM).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_qk_norms_of_qwen3_and_gemma3(dtype: torch.dtype) -> None:
    """To the bit, which shows in 16 bits where each rounds."""
    qkv, no_rope = random_qkv(dtype), torch.empty(N, 0)
    q, k = qkv[:, :HEADS], qkv[:, HEADS : HEADS + KV_HEADS]
    for norm, offset in ((Qwen3RMSNorm, 0.0), (Gemma3RMSNorm, 1.0)):
        q_norm, k_norm = norm(DIM, eps=1e-3).to(dtype), norm(DIM, eps=1e-3).to(dtype)
        with torch.inference_mode():
            for module in (q_norm, k_norm):
                module.weight.copy_(torch.randn(DIM))
            gains = [w.float() + 1 if offset else w for w in (q_norm.weight, k_norm.weight)]
            found = run_rope(qkv, no_rope, (gains[0], gains[1], 1e-3))
            assert torch.equal(found[0], q_norm(q)) and torch.equal(found[1], k_norm(k))


def cos_sin_of(rotary_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ours, and transformers' cosines and sines: [1, N, rotary_dim], the angles twice."""
    cos_sin = rope_cos_sin(10000 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim), torch.arange(N))
    cos, sin = (part.repeat(1, 2)[None] for part in cos_sin.chunk(2, -1))
    return cos_sin, cos, sin


@pytest.mark.parametrize("rotary_dim", [2, 10, 16, 32])
@pytest.mark.parametrize("family", [neox, glm], ids=["halves", "interleaved"])
def test_partial_rotation_of_neox_and_glm(rotary_dim: int, family: object) -> None:
    qkv, (cos_sin, cos, sin) = random_qkv(), cos_sin_of(rotary_dim)
    q, k = qkv[None, :, :HEADS], qkv[None, :, HEADS : HEADS + KV_HEADS]
    wanted = family.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)  # type: ignore[attr-defined]
    for found, want in zip(run_rope(qkv, cos_sin, interleaved=family is glm), wanted, strict=True):
        torch.testing.assert_close(found, want[0], atol=1e-5, rtol=1e-5)


def test_interleaved_rotation_of_gptj() -> None:
    rotary_dim, qkv = 16, random_qkv()
    sin, cos = gptj.create_sinusoidal_positions(N, rotary_dim)[None].chunk(2, -1)
    q = qkv[None, :, :HEADS]
    turned = gptj.apply_rotary_pos_emb(q[..., :rotary_dim], sin, cos)
    found = run_rope(qkv, cos_sin_of(rotary_dim)[0], interleaved=True)[0]
    wanted = torch.cat((turned, q[..., rotary_dim:]), -1)[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
