"""Norm and several projections of its output, each with its low-rank update: the way from a block's input to q, k, v.

``x = RMSNorm(h)``, ``y_i = x W_i^T + b_i + scaling_i (g_i * (x A_i^T)) B_i^T``.

Kept for backward: ``h`` (the residual stream, which the block's end keeps anyway), one number per token for the norm,
and the ``r`` wide ``x A^T``. ``x`` is computed again: two cheap passes instead of a tensor of full width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moa.adapters.fused.elementwise import inverse_rms, rms_norm_backward, scale_rows
from moa.adapters.fused.low_rank import Update, read, write, write_backward


class Projections(NamedTuple):
    """Several linear layers over the same input.

    Attributes:
        weights: frozen, each (out_i, in).
        biases: frozen, each (out_i,) or None.
        updates: for every layer, or None where it has no update.
        a: trained, the A of each layer with an update, (rank_i, in).
        b: trained, the B of each layer with an update, (out_i, rank_i).
    """

    weights: list[Tensor]
    biases: list[Tensor | None]
    updates: list[Update | None]
    a: list[Tensor]
    b: list[Tensor]


def stack(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Matrices of equal width below each other."""
    return torch.cat(list(matrices)).to(dtype) if len(matrices) > 1 else matrices[0].to(dtype)


def project(
    x: Tensor, layers: Projections, a: Tensor | None, b: Sequence[Tensor], gates: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The layers' outputs (..., out_i) for ``x`` (..., in), and ``x A^T`` of those with an update.

    Args:
        x: input.
        layers: what to compute; its ``a`` and ``b`` are not read.
        a: all A's stacked, in the dtype of ``x``; None if there is no update.
        b: all B's in that dtype.
        gates: (n, columns) in that dtype, or None.
    """
    outputs = [F.linear(x, w, bias) for w, bias in zip(layers.weights, layers.biases, strict=True)]
    if a is None:
        return outputs, []
    lows = read(x.reshape(-1, x.shape[-1]), a, [m.shape[1] for m in b])
    updated = [(y, u) for y, u in zip(outputs, layers.updates, strict=True) if u is not None]
    for (y, update), low, matrix in zip(updated, lows, b, strict=True):
        write(y.view(-1, y.shape[-1]), low, matrix, update, gates)
    return outputs, lows


class NormProject(torch.autograd.Function):
    """See the module's head. Gradients go to ``h``, the gates, and all A's and B's; W, b and the norm are frozen."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, norm: Tensor, eps: float, gates: Tensor | None, layers: Projections, *ab: Tensor
    ) -> Any:
        inverse = inverse_rms(h, eps)
        a, b = stack_all(ab, h.dtype)
        outputs, lows = project(scale_rows(h, inverse, norm), layers, a, b, gates)
        ctx.updates, ctx.sizes = layers.updates, (len(outputs), len(b))
        ctx.save_for_backward(h, inverse, norm, gates, a, *layers.weights, *b, *lows)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        h, inverse, norm, gates, a, *rest = ctx.saved_tensors
        weights, b, lows = split(rest, *ctx.sizes)
        h_2d, inverse = h.reshape(-1, h.shape[-1]), inverse.view(-1, 1)
        grads = tuple(grad.reshape(-1, grad.shape[-1]) for grad in grads)
        grad_gates = None if gates is None else torch.zeros_like(gates)
        grad_low, grad_b = write_all_backward(grads, lows, b, ctx.updates, gates, grad_gates)
        grad_a: list[Tensor] = []
        if grad_low is not None:
            x = scale_rows(h_2d, inverse, norm)
            grad_a = list(torch.mm(grad_low.t(), x).split([matrix.shape[1] for matrix in b]))
        grad_h = None
        if ctx.needs_input_grad[0]:
            grad_x = read_backward(grads, weights, grad_low, a)
            grad_h = rms_norm_backward(grad_x, h_2d, inverse, norm).view_as(h)
        return grad_h, None, None, grad_gates, None, *grad_a, *grad_b


def stack_all(ab: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor | None, list[Tensor]]:
    """A's and B's in one row, as autograd wants them -> all A's stacked, and the B's, in ``dtype``."""
    if not ab:
        return None, []
    a, b = ab[: len(ab) // 2], ab[len(ab) // 2 :]
    return stack(a, dtype), [matrix.to(dtype) for matrix in b]


def split(tensors: Sequence[Tensor], first: int, second: int) -> tuple[Sequence[Tensor], ...]:
    return tensors[:first], tensors[first : first + second], tensors[first + second :]


def write_all_backward(
    grads: Sequence[Tensor],
    lows: Sequence[Tensor],
    b: Sequence[Tensor],
    updates: Sequence[Update | None],
    gates: Tensor | None,
    grad_gates: Tensor | None,
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients towards ``x A^T`` of all updates side by side, (n, sum of ranks), and towards each B."""
    grad_lows, grad_b = [], []
    updated = [(grad, update) for grad, update in zip(grads, updates, strict=True) if update is not None]
    for (grad, update), low, matrix in zip(updated, lows, b, strict=True):
        grad_low, grad_matrix = write_backward(grad, low, matrix, update, gates, grad_gates)
        grad_lows.append(grad_low)
        grad_b.append(grad_matrix)
    return (torch.cat(grad_lows, dim=1) if grad_lows else None), grad_b


def read_backward(
    grads: Sequence[Tensor], weights: Sequence[Tensor], grad_low: Tensor | None, a: Tensor | None
) -> Tensor:
    """Gradient towards the layers' common input, in one buffer."""
    grad_x = torch.mm(grads[0], weights[0])
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        grad_x.addmm_(grad, weight)
    if grad_low is not None and a is not None:
        grad_x.addmm_(grad_low, a)
    return grad_x
