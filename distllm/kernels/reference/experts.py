"""Mixture of experts: which experts a token goes to, and the gated MLPs of the experts themselves."""

from __future__ import annotations

import torch

from distllm.kernels.reference.activation import activate_mul


def route(router_logits: torch.Tensor, top_k: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(shares [num_tokens, top_k] fp32, experts [num_tokens, top_k] int64): the top_k largest of a softmax
    over all experts, in fp32; renormalize makes them sum to 1.

    router_logits: [num_tokens, num_experts].
    """
    shares, experts = router_logits.float().softmax(-1).topk(top_k, dim=-1)
    return (shares / shares.sum(-1, keepdim=True) if renormalize else shares), experts


def expert_mlp(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    shares: torch.Tensor,
    experts: torch.Tensor,
) -> torch.Tensor:
    """Σ over a token's experts of share · down(silu(gate x) · up x). Returns [num_tokens, width].

    x: [num_tokens, width]; gate_up: [num_experts, 2 · inner, width], gate rows first; down: [num_experts,
    width, inner]; shares, experts: [num_tokens, top_k], of route(). An expert may have no token.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in experts.unique().tolist():
        tokens, place = (experts == expert).nonzero(as_tuple=True)
        inner = activate_mul(x[tokens] @ gate_up[expert].T, "silu")
        out.index_add_(0, tokens, (inner @ down[expert].T).float() * shares[tokens, place, None])
    return out.to(x.dtype)
