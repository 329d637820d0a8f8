"""Load-balance and z-loss, injected in backward.

A term that is added to ``output.loss`` is lost under reentrant checkpointing and in trainers that recompute the loss
(TRL's SFTTrainer). So the gates pass through an autograd function that leaves them as they are and, when their
gradient comes back, starts the gradient of the auxiliary loss as well. The reported loss stays the model's own.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moa.adapters.gating import Gates, Gating

_scale = 1.0


@contextmanager
def auxiliary_scale(scale: float) -> Iterator[None]:
    """Multiply injected gradients, e.g. by ``1 / gradient_accumulation_steps`` as a trainer does with its loss."""
    global _scale
    before, _scale = _scale, scale
    try:
        yield
    finally:
        _scale = before


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_like = loss.detach()
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.full_like(ctx.loss_like, _scale)


def auxiliary_loss(gates: Gates, logits: Tensor, tokens: Tensor | None, gating: Gating) -> Tensor:
    """The weighted sum of both terms, a scalar.

    Args:
        gates: what the rule returned, tensors (batch, tokens, experts).
        logits: (batch, tokens, experts).
        tokens: (batch, tokens), True for text; None counts every position.
        gating: holds the two weights.
    """
    experts = logits.shape[-1]
    keep = None if tokens is None else tokens.reshape(-1)
    weights, scores, flat = (t.reshape(-1, experts) for t in (gates.weights, gates.scores, logits))
    if keep is not None:
        weights, scores, flat = weights[keep], scores[keep], flat[keep]
    share = (weights.detach() != 0).to(scores.dtype).mean(0)
    loss = gating.balance * experts * (share * scores.mean(0)).sum()
    if gating.z_loss:
        loss = loss + gating.z_loss * torch.logsumexp(flat.to(scores.dtype), dim=-1).square().mean()
    return loss


def add_auxiliary_loss(gates: Gates, logits: Tensor, tokens: Tensor | None, gating: Gating) -> Gates:
    """``gates``, unchanged in value, that will also send back the gradient of `auxiliary_loss`."""
    if not torch.is_grad_enabled():
        return gates
    loss = auxiliary_loss(gates, logits, tokens, gating)
    return gates._replace(weights=_Inject.apply(gates.weights, loss))
