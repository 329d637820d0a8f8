"""The arithmetic of the experts: plain functions of tensors that know nothing of models, adapters or PEFT.

Gates act where they are cheapest: a gated LoRA scales the ``r`` numbers of ``A x``, never the full-width product.
Copies of an expert are rows of one wider expert whose gates differ from row block to row block, so that a mixture of
eight LoRAs is still two matrix products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def spread(route: Tensor, width: int) -> Tensor:
    """(..., copies) -> (..., width): every copy's weight repeated over its equal share of ``width`` numbers."""
    return route.repeat_interleave(width // route.shape[-1], dim=-1)


def combine(gate: Tensor | None, route: Tensor | None) -> Tensor | None:
    """The product of an expert's gate (..., 1) and its copies' weights (..., copies); None stands for one."""
    if gate is None or route is None:
        return route if gate is None else gate
    return gate * route


def rank_space(low: Tensor, width: int, weights: Tensor | None) -> Tensor:
    """``w * (A x)``, with ``w`` over rank blocks (paper, section 3; official `llama.py:118-123`).

    Args:
        low: ``A x``, (..., copies * r), or (..., r) if the copies share one A.
        width: copies * r.
        weights: (..., copies), (..., 1), or None for no gate.

    Returns:
        (..., width), what the copies' B matrices side by side read.
    """
    if low.shape[-1] != width:  # one A for all copies
        low = _tile(low, width)
    return low if weights is None else low * spread(weights, width).to(low.dtype)


def _tile(low: Tensor, width: int) -> Tensor:
    return low.repeat(*(1,) * (low.dim() - 1), width // low.shape[-1])


def bottleneck(hidden: Tensor, up: Tensor, bias: Tensor, weights: Tensor | None) -> Tensor:
    """``sum_c w_c (U_c h_c + bias_c)``, the second half of a parallel adapter.

    Args:
        hidden: (..., size) or (..., copies * size), after the activation.
        up: (out, copies * size).
        bias: (copies, out).
        weights: (..., copies), (..., 1), or None for no gate.

    Returns:
        (..., out).
    """
    if hidden.shape[-1] != up.shape[-1]:  # one down projection for all copies
        hidden = _tile(hidden, up.shape[-1])
    if weights is None:
        return F.linear(hidden, up) + bias.sum(0)
    weights = weights.to(hidden.dtype)
    return F.linear(hidden * spread(weights, hidden.shape[-1]), up) + weights @ bias


def prompt_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, head_gate: Tensor, route: Tensor | None
) -> Tensor:
    """Attention over a prompt with a softmax of its own (LLaMA-Adapter, eq. 5; official `llama.py:480-510`).

    Args:
        query: (batch, heads, tokens, width), after rotary embedding.
        key: (kv_heads, prompt, width), not rotated.
        value: (kv_heads, prompt, value_width).
        scaling: factor on the scores.
        head_gate: (heads,), multiplies each head's output.
        route: (batch, tokens, copies) weights of equal shares of the prompt, or None.

    Returns:
        (batch, tokens, heads, value_width).
    """
    batch, heads, length, width = query.shape
    kv_heads, prompt, _ = key.shape
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * length, width)
    scores = torch.matmul(grouped, key.transpose(-1, -2)) * scaling
    shares = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    shares = shares.view(batch, heads, length, prompt) * head_gate.to(shares.dtype).view(1, heads, 1, 1)
    if route is not None:
        shares = shares * spread(route, prompt).to(shares.dtype).unsqueeze(1)
    shares = shares.to(value.dtype).view(batch, kv_heads, heads // kv_heads * length, prompt)
    return torch.matmul(shares, value).view(batch, heads, length, -1).transpose(1, 2)
