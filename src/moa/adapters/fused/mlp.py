"""A gated MLP behind its norm, with the updates of its three projections and a parallel adapter.

``x = RMSNorm(h)``, ``c = silu(x W_g^T) * x W_u^T``, ``h' = h + (c W_d^T + update(c) + g_p * (U silu(D x + b) + e))``.

Whatever is added to the output is one product: ``[g_d * (c A^T) * scaling | g_p * silu(D x + b) | g_p]`` times
``[B | U | e]^T``. Kept for backward: ``h``, the two inner activations, and the narrow tensors; ``x`` and ``c`` are
computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moa.adapters.fused.elementwise import inverse_rms, rms_norm_backward, scale_rows, swiglu, swiglu_backward
from moa.adapters.fused.low_rank import Update, gate_of, narrow, outer_product, times
from moa.adapters.fused.projections import Projections, project, read_backward, split, stack_all, write_all_backward


class Mlp(NamedTuple):
    """What is fixed about a block's MLP.

    Attributes:
        inner: the gate and up projections with their updates.
        weight: of the down projection, frozen, (hidden, intermediate).
        bias: frozen, (hidden,) or None.
        update: of the down projection, or None.
        parallel_column: column of the parallel adapter's gate; None: not gated.
    """

    inner: Projections
    weight: Tensor
    bias: Tensor | None
    update: Update | None
    parallel_column: int | None


class Parallel(NamedTuple):
    """A parallel adapter: weights (size, hidden) and (hidden, size) with their biases (size,) and (hidden,)."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor


class Narrow(NamedTuple):
    """The narrow inputs of what is added to the output: ``low`` (n, rank) = c A^T, ``hidden`` (n, size) = D x + b."""

    low: Tensor | None
    hidden: Tensor | None


def narrow_sum(small: Narrow, site: Mlp, gates: Tensor | None) -> Tensor:
    """``[g_d * low * scaling | g_p * silu(hidden) | g_p]``, (n, rank + size + 1)."""
    parts = []
    if small.low is not None and site.update is not None:
        parts.append(times(small.low, gate_of(gates, site.update.column)) * site.update.scaling)
    if small.hidden is not None:
        gate = gate_of(gates, site.parallel_column)
        active = F.silu(small.hidden)
        parts += [times(active, gate), active.new_ones(len(active), 1) if gate is None else gate]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def outer(b: Tensor | None, parallel: Parallel | None, dtype: torch.dtype) -> Tensor | None:
    """``[B | U | e]``, (hidden, rank + size + 1)."""
    parts = [] if b is None else [b]
    if parallel is not None:
        parts += [parallel.up, parallel.up_bias.view(-1, 1)]
    return torch.cat(parts, dim=1).to(dtype) if parts else None


class Weights(NamedTuple):
    """The trained tensors in the dtype of the computation, as `feed_forward` reads them.

    Attributes:
        inner_a: A's of the gate and up projections, stacked, or None.
        inner_b: their B's.
        down_a: (rank, intermediate) or None.
        parallel_down: (size, hidden) or None.
        parallel_bias: (size,) or None.
        outer: see `outer`.
    """

    inner_a: Tensor | None
    inner_b: Sequence[Tensor]
    down_a: Tensor | None
    parallel_down: Tensor | None
    parallel_bias: Tensor | None
    outer: Tensor | None


def weights_of(inner: Sequence[Tensor], down: Sequence[Tensor], parallel: Parallel | None, dtype: Any) -> Weights:
    """Prepare the trained tensors: ``inner`` as in `NormProject`, ``down`` (A, B) or nothing."""
    a, b = stack_all(inner, dtype)
    return Weights(
        inner_a=a,
        inner_b=b,
        down_a=down[0].to(dtype) if down else None,
        parallel_down=None if parallel is None else parallel.down.to(dtype),
        parallel_bias=None if parallel is None else parallel.down_bias.to(dtype),
        outer=outer(down[1] if down else None, parallel, dtype),
    )


def feed_forward(
    h: Tensor, x: Tensor, site: Mlp, weights: Weights, gates: Tensor | None
) -> tuple[Tensor, list[Tensor], list[Tensor], Narrow]:
    """``h'`` for ``h`` and its norm ``x``, both (batch, tokens, hidden), and what backward needs of it."""
    inner, lows = project(x, site.inner, weights.inner_a, weights.inner_b, gates)
    active = swiglu(*inner)
    y = F.linear(active, site.weight, site.bias)
    small = Narrow(None, None)
    if weights.outer is not None:
        low = hidden = None
        if weights.down_a is not None:
            low = narrow(active.view(-1, active.shape[-1]), weights.down_a)
        if weights.parallel_down is not None and weights.parallel_bias is not None:
            hidden = narrow(x.reshape(-1, x.shape[-1]), weights.parallel_down) + weights.parallel_bias
        small = Narrow(low, hidden)
        y.view(-1, y.shape[-1]).addmm_(narrow_sum(small, site, gates), weights.outer.t())
    return y.add_(h), inner, lows, small


class GatedMlp(torch.autograd.Function):
    """See the module's head.

    Arguments of ``apply``: ``h`` (batch, tokens, hidden); the norm's weight and eps; ``gates`` (n, columns) or None; an
    `Mlp`; then the trained tensors in one row: four of a `Parallel` (``parallel`` says whether), A and B of the down
    projection's update, A's and B's of ``inner``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        norm: Tensor,
        eps: float,
        gates: Tensor | None,
        site: Mlp,
        parallel: bool,
        *trained: Tensor,
    ) -> Tensor:
        adapter, down, inner_ab = split(trained, 4 * parallel, 2 * (site.update is not None))
        weights = weights_of(inner_ab, down, Parallel(*adapter) if parallel else None, h.dtype)
        inverse = inverse_rms(h, eps)
        after, inner, lows, small = feed_forward(h, scale_rows(h, inverse, norm), site, weights, gates)
        ctx.site, ctx.parallel, ctx.n_inner = without_weights(site), parallel, len(weights.inner_b)
        ctx.save_for_backward(
            *(h, inverse, norm, gates, *site.inner.weights, site.weight, *inner, *small),
            *(weights.inner_a, weights.down_a, weights.parallel_down, weights.outer, *weights.inner_b, *lows),
        )
        return after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, inverse, norm, gates, w_gate, w_up, w_down, gate, up, low, hidden, *rest = ctx.saved_tensors
        inner_a, down_a, parallel_down, outer_b, *rest = rest
        inner_b, lows = rest[: ctx.n_inner], rest[ctx.n_inner :]
        site, h_2d, inverse = ctx.site, h.reshape(-1, h.shape[-1]), inverse.view(-1, 1)
        grad_2d = grad.reshape(-1, grad.shape[-1])
        gate, up = (t.view(-1, t.shape[-1]) for t in (gate, up))
        grad_gates = None if gates is None else torch.zeros_like(gates)
        x = scale_rows(h_2d, inverse, norm) if ctx.parallel or inner_b else None

        activated = F.silu(gate)
        grad_active = torch.mm(grad_2d, w_down)
        grad_down: list[Tensor] = []
        grad_parallel: list[Tensor] = []
        grad_hidden = None
        if outer_b is not None:
            grad_low, grad_hidden, grad_outer = narrow_backward(
                grad_2d, Narrow(low, hidden), outer_b, site, gates, grad_gates
            )
            rank = 0
            if grad_low is not None:
                rank = grad_low.shape[1]
                grad_active.addmm_(grad_low, down_a)
                grad_down = [torch.mm(grad_low.t(), activated * up), grad_outer[:, :rank]]
            if grad_hidden is not None and x is not None:
                grad_parallel = [torch.mm(grad_hidden.t(), x), grad_hidden.sum(0)]
                grad_parallel += [grad_outer[:, rank:-1], grad_outer[:, -1]]

        grad_inner = swiglu_backward(grad_active, gate, up, activated)
        grad_inner_low, grad_inner_b = write_all_backward(
            grad_inner, lows, inner_b, site.inner.updates, gates, grad_gates
        )
        grad_inner_a: list[Tensor] = []
        if grad_inner_low is not None and x is not None:
            grad_inner_a = list(torch.mm(grad_inner_low.t(), x).split([matrix.shape[1] for matrix in inner_b]))
        grad_x = read_backward(grad_inner, (w_gate, w_up), grad_inner_low, inner_a)
        if grad_hidden is not None:
            grad_x.addmm_(grad_hidden, parallel_down)
        grad_h = rms_norm_backward(grad_x, h_2d, inverse, norm).add_(grad_2d).view_as(h)
        trained = (*grad_parallel, *grad_down, *grad_inner_a, *grad_inner_b)
        return grad_h, None, None, grad_gates, None, None, *trained


def without_weights(site: Mlp) -> Mlp:
    """What backward may keep outside of autograd's saved tensors."""
    return site._replace(inner=site.inner._replace(weights=[], biases=[], a=[], b=[]), weight=None, bias=None)


def narrow_backward(
    grad: Tensor, small: Narrow, outer_b: Tensor, site: Mlp, gates: Tensor | None, grad_gates: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients towards ``low``, ``hidden`` and ``[B | U | e]``; those of the gates are added to ``grad_gates``."""
    grad_outer = outer_product(grad, narrow_sum(small, site, gates))
    grad_sum = narrow(grad, outer_b.t())
    grad_low = grad_hidden = None
    if small.low is not None and site.update is not None:
        grad_low = grad_sum[:, : small.low.shape[1]] * site.update.scaling
        gate = gate_of(gates, site.update.column)
        if gate is not None and grad_gates is not None:
            grad_gates[:, site.update.column] += (grad_low * small.low).sum(-1)
            grad_low.mul_(gate)
    if small.hidden is not None:
        size = small.hidden.shape[1]
        grad_active, gate = grad_sum[:, -1 - size : -1], gate_of(gates, site.parallel_column)
        if gate is not None and grad_gates is not None:
            grad_gates[:, site.parallel_column] += (grad_active * F.silu(small.hidden)).sum(-1) + grad_sum[:, -1]
            grad_active = grad_active * gate
        grad_hidden = torch.ops.aten.silu_backward(grad_active, small.hidden)
    return grad_low, grad_hidden, grad_outer
