"""Narrow updates of wide layers, ``y += scaling * (inner) M^T`` with ``inner`` made from ``x A^T``: the arithmetic.

What makes them cheap in every family and under every kind of linear layer: an input that several experts and the router
read is read once, through all their first matrices together; gates multiply the few numbers of ``inner`` and nothing of
full width; the update goes into the base's own output, in place; and backward keeps ``x`` and the narrow tensors only.

Two regimes. With many tokens the work is memory traffic, and everything is computed in the dtype of the input. With a
few (decoding), calls cost more than arithmetic, and on CPUs a narrow bfloat16 product costs ten times a float32 one;
`few_tokens` is therefore written for few calls in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moa import _hosts

FEW_TOKENS = 32  # measured: from here on the order of factors matters, and the dtype of the input wins in bfloat16


class Part(NamedTuple):
    """One projection's columns in a fused output, which reads as ``(..., groups, slots, width)``."""

    groups: int
    slots: int
    start: int
    stop: int

    def of(self, y: Tensor) -> Tensor:
        """The columns, a view of ``y`` (..., features): (..., groups, stop - start, width), or (..., out) if there is
        just one group.
        """
        if self.groups == 1:
            width = y.shape[-1] // self.slots
            return y.narrow(-1, self.start * width, (self.stop - self.start) * width)
        return y.unflatten(-1, (self.groups, self.slots, -1))[..., self.start : self.stop, :]

    def share(self, processes: int) -> Part:
        """The same columns in one process's equal share of the output, which is made of whole groups."""
        return self._replace(groups=self.groups // processes)


def narrow(x: Tensor, a: Tensor) -> Tensor:
    """``x a^T`` (n, rank) for ``x`` (n, in) and ``a`` (rank, in).

    The order of factors is chosen for narrow matrices: a product with a wide, short result runs several times faster
    on CPUs than its transpose.
    """
    return torch.mm(x, a.t()) if x.shape[0] <= FEW_TOKENS else torch.mm(a, x.t()).t()


def rows(x: Tensor) -> Tensor:
    """(..., features) -> (n, features)."""
    return x.reshape(-1, x.shape[-1])


def read(x: Tensor, matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """``x`` (..., in) through matrices (rank_i, in), as one product: one (..., rank_i) for each, in ``dtype``."""
    if torch.compiler.is_compiling():
        stacked = torch.cat(list(matrices)) if len(matrices) > 1 else matrices[0]
        low = F.linear(x.to(dtype), stacked.to(dtype))
    else:
        low = _Read.apply(x, dtype, *matrices)
    if len(matrices) == 1:
        return [low]
    return list(low.split([len(matrix) for matrix in matrices], dim=-1))


class _Read(torch.autograd.Function):
    """See `read`; returns all ranks side by side. Keeps ``x`` as it came, so that a cast of it is not kept as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, *matrices: Tensor) -> Tensor:
        stacked = (torch.cat(matrices) if len(matrices) > 1 else matrices[0]).to(dtype)
        ctx.save_for_backward(x, stacked)
        ctx.ranks = [len(matrix) for matrix in matrices]
        ctx.dtypes = [matrix.dtype for matrix in matrices]
        with _no_autocast(x):
            return narrow(rows(x).to(dtype), stacked).reshape(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, stacked = ctx.saved_tensors
        grad = rows(grad)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, stacked).to(x.dtype).view(x.shape)
        # (rank, n) times (n, in): short and wide, the fast order
        together = torch.mm(grad.t(), rows(x).to(grad.dtype)).split(ctx.ranks)
        return grad_x, None, *(part.to(dtype) for part, dtype in zip(together, ctx.dtypes, strict=True))


def write(y: Tensor, inner: Tensor, matrix: Tensor, scaling: float, part: Part | None) -> Tensor:
    """``y + scaling * inner matrix^T``, in place where autograd can do without the old ``y``.

    Args:
        y: what a frozen layer put out, (..., features).
        inner: (..., width).
        matrix: (features or those of the part, width).
        scaling: a factor.
        part: which columns of ``y`` are meant; None: all.
    """
    if torch.compiler.is_compiling():
        return y + widen(F.linear(inner * scaling, matrix.to(inner.dtype)), part).to(y.dtype)
    if not torch.is_grad_enabled():
        add_product(y, rows(inner).to(y.dtype), matrix.to(y.dtype), scaling, part)
        return y
    return _Write.apply(y, inner, matrix, scaling, part)


class _Write(torch.autograd.Function):
    """See `write`. Nothing of full width is made or kept for the update."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, inner: Tensor, matrix: Tensor, scaling: float, part: Part | None) -> Tensor:
        inner_rows, cast = rows(inner).to(y.dtype), matrix.to(y.dtype)
        ctx.save_for_backward(inner_rows, cast)
        ctx.scaling, ctx.part, ctx.shape, ctx.dtypes = scaling, part, inner.shape, (inner.dtype, matrix.dtype)
        if changeable(y):
            ctx.mark_dirty(y)
        else:
            y = y.clone()
        with _no_autocast(y):
            add_product(y, inner_rows, cast, scaling, part)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        inner, matrix = ctx.saved_tensors
        ours = rows(grad) if ctx.part is None else ctx.part.of(rows(grad)).reshape(inner.shape[0], -1)
        grad_inner = narrow(ours, matrix.t()).mul_(ctx.scaling)
        grad_matrix = torch.mm(inner.t(), ours).t().mul_(ctx.scaling)
        return grad, grad_inner.reshape(ctx.shape).to(ctx.dtypes[0]), grad_matrix.to(ctx.dtypes[1]), None, None


# Whose backward does not look at what they put out. Others may (a sigmoid does), and get a copy to be changed.
_CARELESS = ("UnsafeView", "Addmm", "Mm", "Bmm", "Add", "Mul", "_Write", "Linear", "MatMul4Bit", "MatMul8bitLt")


def changeable(y: Tensor) -> bool:
    """Whether ``y`` can be changed in place without an error in backward and without work to replay it.

    A view (of a layer with a bias, say) would drag its whole chain of views into backward: a copy is cheaper.
    """
    if _hosts.is_view(y):
        return False
    if y.grad_fn is None:
        return not y.requires_grad
    return type(y.grad_fn).__name__.rstrip("0").removesuffix("Backward") in _CARELESS


def add_product(y: Tensor, inner: Tensor, matrix: Tensor, scaling: float, part: Part | None) -> None:
    """``y += scaling * inner matrix^T`` in place, ``inner`` (n, width), all of one dtype and without gradients."""
    own = y.view(-1, y.shape[-1]) if part is None else part.of(y.view(-1, y.shape[-1]))
    if own.dim() == 2:
        own.addmm_(inner, matrix.t(), alpha=scaling)
    else:
        own.add_(torch.mm(inner, matrix.t()).view(own.shape), alpha=scaling)


def widen(delta: Tensor, part: Part | None) -> Tensor:
    """What is meant for one part of a fused projection -> full width, with zeros for its other parts."""
    if part is None:
        return delta
    slots = delta.unflatten(-1, (part.groups, part.stop - part.start, -1))
    return F.pad(slots, (0, 0, part.start, part.slots - part.stop)).flatten(-3)


def spread(weights: Tensor, width: int) -> Tensor:
    """(..., copies) -> (..., width): every copy's weight repeated over its equal share of ``width`` numbers."""
    return weights.repeat_interleave(width // weights.shape[-1], dim=-1)


def tiled(inner: Tensor, width: int) -> Tensor:
    """(..., r) -> (..., width): what all copies share, once per copy."""
    return inner if inner.shape[-1] == width else inner.repeat(*(1,) * (inner.dim() - 1), width // inner.shape[-1])


def weighted(inner: Tensor, weights: Tensor | None) -> Tensor:
    """``inner`` (..., width) times weights (..., copies), (..., 1), or None for one."""
    if weights is None:
        return inner
    return inner * (weights if weights.shape[-1] == 1 else spread(weights, inner.shape[-1]))


def _no_autocast(x: Tensor) -> Any:
    """Casts here are explicit; autocast would add its own inside of an in-place product and fail."""
    return torch.autocast(x.device.type, enabled=False)
