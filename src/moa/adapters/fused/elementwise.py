"""Norm, rotation and SwiGLU with their derivatives: what costs memory traffic and hardly any arithmetic.

Forward functions do what transformers' modules do in the same order of operations, so that their results are the same
to the bit; they only reuse memory. Backward functions are free to do it in fewer passes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """At least float32; the same tensor if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` over the last dimension, (..., 1), in float32 or wider."""
    return wide(x).pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()


def scale_rows(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """``weight * (x * inverse)``, rounded to the dtype of ``x`` in between, as transformers' RMSNorm does."""
    return (wide(x) * inverse).to(x.dtype).mul_(weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm without anything kept for backward."""
    if x.dtype == torch.float32 and x.device.type == "cpu":  # one call; there it is the same to the bit
        return F.rms_norm(x, weight.shape, weight, eps)
    return scale_rows(x, inverse_rms(x, eps), weight)


def rms_norm_backward(grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """Gradient of `rms_norm` towards ``x``; overwrites ``grad`` where it can."""
    if grad.dtype != inverse.dtype:
        scaled, wide_x = wide(grad) * wide(weight), wide(x)
    else:
        scaled, wide_x = grad.mul_(weight), x
    mean = torch.linalg.vecdot(scaled, wide_x).unsqueeze(-1).mul_(inverse.square()).mul_(1.0 / x.shape[-1])
    return torch.addcmul(scaled, wide_x, mean, value=-1, out=scaled).mul_(inverse).to(x.dtype)


def signed(sin: Tensor) -> Tensor:
    """Sines with their first half negated: ``rotate_half(x) * sin`` is ``roll(x)`` times them."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary embedding of ``x`` (..., width), ``x * cos + rotate_half(x) * sin``."""
    return (x * cos).add_(torch.roll(x, x.shape[-1] // 2, -1).mul_(signed_sin))


def rotate_backward(grad: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    return torch.roll(grad * signed_sin, grad.shape[-1] // 2, -1).add_(grad * cos)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, activated: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients towards ``gate`` and ``up``, given ``silu(gate)``; overwrites ``grad`` and ``activated``."""
    grad_up = activated.mul_(grad)
    return torch.ops.aten.silu_backward(grad.mul_(up), gate), grad_up


class Rotate(torch.autograd.Function):
    """`rotate` of queries and keys (batch, tokens, heads, width); keeps the angles only."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, cos: Tensor, signed_sin: Tensor):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos, signed_sin)
        return rotate(query, cos, signed_sin), rotate(key, cos, signed_sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_query: Tensor, grad_key: Tensor):  # type: ignore[no-untyped-def]
        cos, signed_sin = ctx.saved_tensors
        return rotate_backward(grad_query, cos, signed_sin), rotate_backward(grad_key, cos, signed_sin), None, None
