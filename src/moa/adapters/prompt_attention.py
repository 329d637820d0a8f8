"""Attention over a learned prompt with a softmax of its own, added to the text's attention: the arithmetic.

``o' = o + w * (head_gate * softmax(q K_p^T * scaling)) V_p`` (LLaMA-Adapter, eq. 5; official `llama.py:480-510`).

In memory the prompt comes before the tokens, (heads, prompt, n): a softmax over ten numbers that lie side by side is
not vectorised on CPUs, one over ten rows is. Backward computes the shares again; kept are ``q``, which the text's own
attention keeps anyway, and the narrow tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moa.adapters.low_rank import spread


class Prompt(NamedTuple):
    """A prompt as attention sees it.

    Attributes:
        key: (kv_heads, prompt, width), not rotated.
        value: (kv_heads, prompt, value_width).
        head_gate: (heads,), multiplies each head's output.
    """

    key: Tensor
    value: Tensor
    head_gate: Tensor


def add_prompt(output: Tensor, query: Tensor, prompt: Prompt, scaling: float, weights: Tensor | None) -> Tensor:
    """The text's attention ``output`` (batch, tokens, heads, value_width) with the prompt's added: without gradients in
    place, otherwise a new tensor, as attention's own backward looks at what it put out.

    Args:
        output: of the text's own attention.
        query: (batch, heads, tokens, width), after rotary embedding.
        prompt: see `Prompt`.
        scaling: factor on the scores.
        weights: (batch, tokens, copies) of equal shares of the prompt, (batch, tokens, 1), or None.
    """
    if torch.compiler.is_compiling() or (weights is not None and weights.shape[-1] > 1):
        return output + prompt_alone(query, prompt, scaling, weights).to(output.dtype)
    if torch.is_grad_enabled():
        return _AddPrompt.apply(output, query, *prompt, scaling, weights)
    output = output.contiguous()
    _add_in_place(output, query, prompt, scaling, weights)
    return output


def prompt_alone(query: Tensor, prompt: Prompt, scaling: float, weights: Tensor | None) -> Tensor:
    """What is added, (batch, tokens, heads, value_width), by plain operations; arguments as for `add_prompt`."""
    batch, heads, length, width = query.shape
    kv_heads, size, _ = prompt.key.shape
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * length, width)
    scores = torch.matmul(grouped, prompt.key.to(query.dtype).transpose(-1, -2)) * scaling
    shares = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    shares = shares.view(batch, heads, length, size) * prompt.head_gate.to(shares.dtype).view(1, heads, 1, 1)
    if weights is not None:
        shares = shares * spread(weights, size).to(shares.dtype).unsqueeze(1)
    shares = shares.to(query.dtype).view(batch, kv_heads, heads // kv_heads * length, size)
    return torch.matmul(shares, prompt.value.to(query.dtype)).view(batch, heads, length, -1).transpose(1, 2)


def per_head(x: Tensor, heads: int) -> Tensor:
    """(kv_heads, ...) -> (heads, ...)."""
    return x if x.shape[0] == heads else x.repeat_interleave(heads // x.shape[0], dim=0)


def _shares(queries: Tensor, prompt: Prompt, gate: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """How much of each prompt token every query takes, before and after all gates, both (heads, prompt, n).

    ``queries`` are (heads, n, width), ``gate`` (n,) or None.
    """
    scores = torch.bmm(per_head(prompt.key, len(queries)), queries.transpose(1, 2)).mul_(scaling)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    shares = torch.softmax(wide, dim=1).to(queries.dtype)
    gated = shares * prompt.head_gate.to(queries.dtype).view(-1, 1, 1)
    return shares, gated if gate is None else gated.mul_(gate)


def _add_in_place(output: Tensor, query: Tensor, prompt: Prompt, scaling: float, weights: Tensor | None) -> None:
    with torch.autocast(output.device.type, enabled=False):
        prompt, queries, gate = _cast(query, *prompt, weights)
        _, gated = _shares(queries, prompt, gate, scaling)
        shares, value = gated.transpose(1, 2).to(output.dtype), per_head(prompt.value, len(queries)).to(output.dtype)
        output.view(-1, *output.shape[-2:]).transpose(0, 1).baddbmm_(shares, value)


class _AddPrompt(torch.autograd.Function):
    """See `add_prompt`."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        head_gate: Tensor,
        scaling: float,
        weights: Tensor | None,
    ) -> Tensor:
        ctx.scaling = scaling
        ctx.save_for_backward(query, key, value, head_gate, weights)
        total = output.clone(memory_format=torch.contiguous_format)
        _add_in_place(total, query, Prompt(key, value, head_gate), scaling, weights)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.autocast(grad.device.type, enabled=False):
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> Any:
    """With shares ``p``, gates ``c = head_gate * g`` and ``dw = grad V^T``: ``d p = c * dw``, and of the softmax
    ``d s = p * (d p - sum(p * d p))``. As ``c`` is the same for all of a query's prompt tokens, this is
    ``gated * (dw - sum(dw * p))``.
    """
    query, key, value, head_gate, weights = ctx.saved_tensors
    prompt, queries, gate = _cast(query, key, value, head_gate, weights)
    shares, gated = _shares(queries, prompt, gate, ctx.scaling)
    heads, kv_heads = len(queries), len(key)
    ours = grad.reshape(-1, *grad.shape[-2:]).transpose(0, 1).to(queries.dtype)  # (heads, n, value_width)
    grad_gated = torch.bmm(per_head(prompt.value, heads), ours.transpose(1, 2))
    grad_value = torch.bmm(gated, ours)
    mean = (grad_gated * shares).sum(1, keepdim=True)  # (heads, 1, n), also d / d (head_gate * g)
    per_token = mean.squeeze(1)
    grad_head_gate = per_token.sum(-1) if gate is None else torch.mv(per_token, gate)
    grad_weights = None
    if gate is not None:
        grad_weights = torch.mv(per_token.t(), prompt.head_gate.to(per_token.dtype)).view_as(weights)
    grad_scores = grad_gated.sub_(mean).mul_(gated).mul_(ctx.scaling)
    grad_key = torch.bmm(grad_scores, queries)
    # (batch, tokens, heads, width) in memory, as projections put queries out: whatever comes next is slow otherwise
    batch, _, length, width = query.shape
    grad_query = query.new_empty(batch, length, heads, width)
    by_head = grad_query.view(-1, heads, width).transpose(0, 1)
    by_head.baddbmm_(grad_scores.transpose(1, 2), per_head(prompt.key, heads), beta=0)
    groups = [g.view(kv_heads, heads // kv_heads, *g.shape[1:]).sum(1) for g in (grad_key, grad_value)]
    return (
        grad,
        grad_query.transpose(1, 2),
        groups[0].to(key.dtype),
        groups[1].to(value.dtype),
        grad_head_gate.to(head_gate.dtype),
        None,
        None if grad_weights is None else grad_weights.to(weights.dtype),
    )


def _cast(
    query: Tensor, key: Tensor, value: Tensor, head_gate: Tensor, weights: Tensor | None
) -> tuple[Prompt, Tensor, Tensor | None]:
    """The prompt in the dtype of ``query``, queries as (heads, n, width), and the gate as (n,)."""
    queries = query.transpose(0, 1).reshape(query.shape[1], -1, query.shape[-1])
    gate = None if weights is None else weights.reshape(-1).to(query.dtype)
    return Prompt(key.to(query.dtype), value.to(query.dtype), head_gate), queries, gate


class KeptPrompt(NamedTuple):
    """A prompt made ready for decoding a few tokens.

    Attributes:
        key: (heads, width, prompt), scaled.
        value: (heads, prompt, value_width), with the heads' gates.
    """

    key: Tensor
    value: Tensor

    @classmethod
    def of(cls, prompt: Prompt, scaling: float) -> KeptPrompt:
        """In float32 at least, whose narrow products are the fast ones on CPUs."""
        heads, dtype = len(prompt.head_gate), torch.promote_types(prompt.key.dtype, torch.float32)
        key = per_head(prompt.key.to(dtype) * scaling, heads).transpose(1, 2).contiguous()
        return cls(key, per_head(prompt.value.to(dtype), heads) * prompt.head_gate.to(dtype).view(-1, 1, 1))

    def add_to(self, output: Tensor, query: Tensor, weights: float | Tensor | None) -> Tensor:
        """As `add_prompt` without gradients, for one weight per token."""
        output = output.contiguous()
        heads, width, dtype = query.shape[1], query.shape[3], self.key.dtype
        if query.shape[0] * query.shape[2] == 1:  # decoding one row: nothing has to change places
            queries, place = query.reshape(heads, 1, width), output.view(heads, 1, -1)
        else:
            queries = query.transpose(0, 1).reshape(heads, -1, width)
            place = output.view(-1, heads, output.shape[-1]).transpose(0, 1)
        shares = torch.softmax(torch.bmm(queries if queries.dtype is dtype else queries.to(dtype), self.key), dim=-1)
        alpha = 1.0
        if isinstance(weights, Tensor):
            shares = shares * weights.view(-1, 1)
        elif weights is not None:
            alpha = weights
        if place.dtype is dtype:
            place.baddbmm_(shares, self.value, alpha=alpha)
        else:
            place.add_(torch.bmm(shares, self.value), alpha=alpha)
        return output
