"""Everything between attention and the residual stream: the prompt's attention, the output projection, its update.

``o' = o + g_p * (head_gate * softmax(q K_p^T * scaling)) V_p``, ``h' = h + (o' W_o^T + b_o + update(o'))``.

Kept for backward: ``q`` and ``o``, which the text's own attention keeps anyway, and ``o' A^T``. The prompt's scores and
``o'`` are computed again. In memory the prompt comes before the tokens, (heads, prompt, n): a softmax over ten numbers
that lie side by side is not vectorised on CPU, one over ten rows is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moa.adapters.fused.elementwise import wide
from moa.adapters.fused.low_rank import Update, gate_of, narrow, write, write_backward


class Prompt(NamedTuple):
    """A prompt as attention sees it.

    Attributes:
        key: (kv_heads, prompt, width).
        value: (kv_heads, prompt, value_width).
        head_gate: (heads,).
    """

    key: Tensor
    value: Tensor
    head_gate: Tensor


def per_head(x: Tensor, heads: int) -> Tensor:
    """(kv_heads, ...) -> (heads, ...)."""
    return x if x.shape[0] == heads else x.repeat_interleave(heads // x.shape[0], dim=0)


def shares_of(query: Tensor, prompt: Prompt, gate: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """How much of each prompt token every query takes, before and after all gates, both (heads, prompt, n).

    Args:
        query: (heads, n, width).
        prompt: see `Prompt`.
        gate: (n, 1) or None.
        scaling: factor on the scores.
    """
    key = per_head(prompt.key, query.shape[0])
    scores = torch.bmm(key, query.transpose(1, 2)).mul_(scaling)
    shares = torch.softmax(wide(scores), dim=1).to(query.dtype)
    gated = shares * prompt.head_gate.to(query.dtype).view(-1, 1, 1)
    return shares, gated if gate is None else gated.mul_(gate.view(1, 1, -1))


def add_prompt(output: Tensor, gated: Tensor, value: Tensor) -> Tensor:
    """``output`` (n, heads, width) with the prompt's part added, in a new tensor."""
    value = per_head(value, gated.shape[0])
    total = output.clone(memory_format=torch.contiguous_format)
    total.transpose(0, 1).baddbmm_(gated.transpose(1, 2), value)
    return total


class Output(NamedTuple):
    """What is fixed about a block's attention output.

    Attributes:
        weight: of the output projection, frozen, (hidden, heads * value_width).
        bias: frozen, (hidden,) or None.
        update: of the output projection, or None.
        prompt_column: column of the prompt's gate; None: not gated.
        scaling: factor on attention scores.
    """

    weight: Tensor
    bias: Tensor | None
    update: Update | None
    prompt_column: int | None
    scaling: float


def tokens_first(x: Tensor) -> Tensor:
    """(batch, tokens, heads, width) -> (n, heads, width)."""
    return x.reshape(-1, *x.shape[-2:])


def attend(
    h: Tensor, query: Tensor, output: Tensor, gates: Tensor | None, site: Output, prompt: Prompt | None, ab: Any
) -> tuple[Tensor, Tensor | None]:
    """The block's middle, ``h'`` (batch, tokens, hidden), and ``o' A^T``; see `AttentionOutput` for the arguments."""
    mixed = output
    if prompt is not None:
        gate = gate_of(gates, site.prompt_column)
        _, gated = shares_of(tokens_first(query).transpose(0, 1), prompt, gate, site.scaling)
        mixed = add_prompt(tokens_first(output), gated, prompt.value)
    flat = mixed.reshape(*h.shape[:-1], -1)
    y = F.linear(flat, site.weight, site.bias)
    low = None
    if site.update is not None:
        low = narrow(flat.view(-1, flat.shape[-1]), ab[0])
        write(y.view(-1, y.shape[-1]), low, ab[1], site.update, gates)
    return y.add_(h), low


class AttentionOutput(torch.autograd.Function):
    """See the module's head.

    Arguments of ``apply``: ``h`` (batch, tokens, hidden), the block's input; ``query`` and ``output`` of the text's
    attention, both (batch, tokens, heads, width); ``gates`` (n, columns) or None; a `Output`; the three tensors of a
    `Prompt`, or three None; A (rank, heads * width) and B (hidden, rank) of the update, or nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        query: Tensor,
        output: Tensor,
        gates: Tensor | None,
        site: Output,
        key: Tensor | None,
        value: Tensor | None,
        head_gate: Tensor | None,
        *ab: Tensor,
    ) -> Tensor:
        prompt = None if key is None else Prompt(key, value, head_gate)  # type: ignore[arg-type]
        cast = [matrix.to(h.dtype) for matrix in ab]
        middle, low = attend(h, query, output, gates, site, prompt, cast)
        ctx.site = site._replace(weight=None, bias=None)
        ctx.save_for_backward(query, output, gates, key, value, head_gate, low, site.weight, *cast)
        return middle

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, output, gates, key, value, head_gate, low, weight, *ab = ctx.saved_tensors
        site, batch = ctx.site, output.shape[:2]
        grad_2d = grad.reshape(-1, grad.shape[-1])
        grad_flat = torch.mm(grad_2d, weight)
        grad_gates = None if gates is None else torch.zeros_like(gates)
        mixed, prompt = tokens_first(output), None
        if key is not None:
            prompt = Prompt(key, value, head_gate)
            queries = tokens_first(query).transpose(0, 1)
            shares, gated = shares_of(queries, prompt, gate_of(gates, site.prompt_column), site.scaling)
            mixed = add_prompt(mixed, gated, value) if ab else mixed
        grad_ab: list[Tensor] = []
        if ab:
            grad_low, grad_b = write_backward(grad_2d, low, ab[1], site.update, gates, grad_gates)
            grad_flat.addmm_(grad_low, ab[0])
            grad_ab = [torch.mm(grad_low.t(), mixed.reshape(grad_low.shape[0], -1)), grad_b]
        grad_output = grad_flat.view(output.shape)
        grad_query, grad_prompt = None, (None, None, None)
        if prompt is not None:
            grad_query, grad_prompt = prompt_backward(
                tokens_first(grad_output), queries, prompt, shares, gated, gates, grad_gates, site
            )
            grad_query = grad_query.view(*batch, *grad_query.shape[1:])
        return grad, grad_query, grad_output, grad_gates, None, *grad_prompt, *grad_ab


def prompt_backward(
    grad: Tensor,
    queries: Tensor,
    prompt: Prompt,
    shares: Tensor,
    gated: Tensor,
    gates: Tensor | None,
    grad_gates: Tensor | None,
    site: Output,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Gradients towards the queries (n, heads, width) and the `Prompt`, given that of its part (n, heads, width).

    With shares ``p`` and gates ``c = head_gate * g``: ``d p = c * dw`` and ``d s = p * (d p - sum(p * d p))``, where
    ``dw = grad V^T``; as ``c`` is the same for all of a query's prompt tokens, ``d s = gated * (dw - sum(dw * p))``.
    """
    heads, kv_heads = queries.shape[0], prompt.key.shape[0]
    grad_heads = grad.transpose(0, 1)
    grad_gated = torch.bmm(per_head(prompt.value, heads), grad_heads.transpose(1, 2))
    grad_value = torch.bmm(gated, grad_heads)
    mean = (grad_gated * shares).sum(1, keepdim=True)  # (heads, 1, n), also d / d (head_gate * g)
    gate, head_gate = gate_of(gates, site.prompt_column), prompt.head_gate
    per_token = mean.squeeze(1)
    grad_head_gate = per_token.sum(-1) if gate is None else torch.mv(per_token, gate.squeeze(1))
    if gate is not None and grad_gates is not None:
        grad_gates[:, site.prompt_column] += torch.mv(per_token.t(), head_gate.to(per_token.dtype))
    grad_scores = grad_gated.sub_(mean).mul_(gated).mul_(site.scaling)
    grad_key = torch.bmm(grad_scores, queries)
    grad_query = torch.bmm(grad_scores.transpose(1, 2), per_head(prompt.key, heads)).transpose(0, 1)
    per_kv_head = [g.view(kv_heads, heads // kv_heads, *g.shape[1:]).sum(1) for g in (grad_key, grad_value)]
    return grad_query, (per_kv_head[0], per_kv_head[1], grad_head_gate)
