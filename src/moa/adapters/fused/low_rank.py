"""Gated low-rank updates of projections that read the same input.

For every projection ``i`` with an update, ``y_i += scaling_i * (g_i * (x A_i^T)) B_i^T``, where ``g_i`` is one gate per
token. The A's lie below each other, so that ``x`` is read once; the gate multiplies the ``r`` numbers of ``x A^T``; the
update goes into ``y_i`` in place, so that nothing of full width is made for it.

The order of factors is chosen for narrow matrices: a product with a wide, short result runs several times faster on
CPU than its transpose (``low^T grad`` instead of ``grad^T low``).

Kept for backward: ``x A^T``, r numbers per token. All tensors are flat in their tokens, n = batch * tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FEW_TOKENS = 32  # measured: below, the order of factors does not matter, and the plain one takes fewer calls


class Update(NamedTuple):
    """What one projection's update is, apart from its weights.

    Attributes:
        scaling: alpha / r, or alpha / sqrt(r).
        column: which column of the gates; None: not gated.
    """

    scaling: float
    column: int | None


def gate_of(gates: Tensor | None, column: int | None) -> Tensor | None:
    """One expert's gates (n, 1), or None."""
    return None if gates is None or column is None else gates[:, column : column + 1]


def times(low: Tensor, gate: Tensor | None) -> Tensor:
    return low if gate is None else low * gate


def read(x: Tensor, a: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """``x`` (n, in) through the stacked A's (sum of ranks, in): one (n, rank) for each."""
    return list(narrow(x, a).split(list(ranks), dim=-1))


def narrow(x: Tensor, a: Tensor) -> Tensor:
    """``x a^T`` (n, rank) for ``x`` (n, in) and ``a`` (rank, in)."""
    return torch.mm(x, a.t()) if x.shape[0] < FEW_TOKENS else torch.mm(a, x.t()).t()


def outer_product(grad: Tensor, low: Tensor) -> Tensor:
    """``grad^T low`` (out, rank), the gradient towards a B."""
    return torch.mm(low.t(), grad).t()


def write(y: Tensor, low: Tensor, b: Tensor, update: Update, gates: Tensor | None) -> None:
    """Add the update to ``y`` (n, out) in place."""
    y.addmm_(times(low, gate_of(gates, update.column)), b.t(), alpha=update.scaling)


def write_backward(
    grad: Tensor, low: Tensor, b: Tensor, update: Update, gates: Tensor | None, grad_gates: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients towards ``low`` (n, rank) and ``b`` (out, rank); that of the gates is added to ``grad_gates``."""
    gate = gate_of(gates, update.column)
    grad_b = outer_product(grad, times(low, gate)).mul_(update.scaling)
    grad_low = narrow(grad, b.t()).mul_(update.scaling)
    if gate is not None and grad_gates is not None:
        grad_gates[:, update.column] += (grad_low * low).sum(-1)
        grad_low = grad_low.mul_(gate)
    return grad_low, grad_b
