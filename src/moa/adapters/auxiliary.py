"""Load-balance and z-loss, injected in backward with the weight that the model's own loss has there.

A term that is added to ``output.loss`` is lost under reentrant checkpointing and in trainers that compute the loss
themselves. So the gates pass through an autograd function that leaves them as they are and, when their gradient comes
back, starts the gradient of the auxiliary loss as well. The reported loss stays the model's own.

Between the model's loss and ``backward()`` trainers multiply: by one over the accumulation steps, by a loss scale, by
this batch's share of all tokens. The injected gradient has to be multiplied alike. `follow_loss` lets the model's
outputs pass through functions that see the gradient come in, before any block does, and read the factor off it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moa.adapters.gating import Gates, Gating


class LossFactor:
    """What the loss of the backward pass that is running has been multiplied by; one before any was seen.

    Autograd runs what was created last first: a forward's outputs, then its blocks, then the outputs of the forward
    before it. So one number is enough, also with several forwards alive, and with blocks that are recomputed.
    """

    def __init__(self) -> None:
        self.value: float | Tensor = 1.0


FACTOR = LossFactor()


class _Follow(torch.autograd.Function):
    """Leaves an output as it is and notes, in backward, the factor that its gradient tells."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, factor_of: Callable[[Tensor, Tensor], Tensor], keep: bool) -> Tensor:
        ctx.factor_of = factor_of
        # Trainers scale losses and logits in place: kept are the numbers, without a count of changes, and what comes
        # out is no view, which autograd would forbid to change.
        ctx.save_for_backward(output.data if keep else output.new_empty(0))
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        FACTOR.value = ctx.factor_of(ctx.saved_tensors[0], grad)
        return grad, None, None


def follow_loss(outputs: Any, arguments: dict[str, Any]) -> None:
    """Watch a model's outputs for what the loss is multiplied by; changes nothing else.

    Args:
        outputs: of a transformers model, ``loss``, ``logits`` and, from TRL's fused head, ``log_probs`` are looked at.
        arguments: what the model was called with, by name.
    """
    share = _share_of_tokens(arguments)
    readers: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
        "loss": (lambda loss, grad: grad * share, False),
        "log_probs": (lambda log_probs, grad: grad.abs().sum(), False),
        "logits": (weight_in_cross_entropy, True),
    }
    for name, (factor_of, keep) in readers.items():
        output = getattr(outputs, name, None)
        if isinstance(output, Tensor) and output.requires_grad:
            outputs[name] = _Follow.apply(output, factor_of, keep)


def _share_of_tokens(arguments: dict[str, Any]) -> float | Tensor:
    """This batch's share of all tokens that the loss is a mean over; transformers' trainer says how many there are."""
    total, labels = arguments.get("num_items_in_batch"), arguments.get("labels")
    if total is None or labels is None:
        return 1.0
    return (labels[..., 1:] != -100).sum() / total


NOT_OF_PROBABILITIES = 0.05  # share of a gradient that rounding to bfloat16 leaves when it should sum to zero


def weight_in_cross_entropy(logits: Tensor, grad: Tensor) -> Tensor:
    """Sum over tokens of the weights ``w`` that their cross-entropies have in a loss, a scalar.

    Cross-entropy's gradient is ``w (p - onehot)``. Its absolute values sum to ``2 w (1 - p_label)``, and the label is
    where it is largest, so that ``w`` follows without knowing labels. Taken over all tokens at once, since a token that
    is predicted for certain tells nothing alone. Exact for equal weights; other losses that are made of probabilities
    keep every factor that they are multiplied by. Of a loss that is not, nothing can be told (its gradient does not sum
    to zero over the vocabulary), and it counts as one.
    """
    logits, grad = logits.flatten(0, -2), grad.flatten(0, -2)
    size = grad.abs()
    total = size.sum(-1)
    told = total > 0
    if grad.sum(-1).abs().sum() > NOT_OF_PROBABILITIES * total.sum():
        return grad.new_ones(())
    label = size.argmax(-1, keepdim=True)
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    missing = -torch.expm1(log_p.gather(-1, label)).squeeze(-1)
    weight = size.to(missing.dtype).sum() / (2 * missing[told].sum()).clamp_min(torch.finfo(missing.dtype).tiny)
    return weight * told.sum()


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_like = loss.detach()
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        factor = torch.as_tensor(FACTOR.value, dtype=ctx.loss_like.dtype, device=ctx.loss_like.device)
        return grad, factor.expand_as(ctx.loss_like)


def auxiliary_loss(gates: Gates, logits: Tensor, tokens: Tensor | None, gating: Gating) -> Tensor:
    """The weighted sum of both terms, a scalar.

    Args:
        gates: what the rule returned, tensors (batch, tokens, experts).
        logits: (batch, tokens, experts).
        tokens: (batch, tokens), True for text; None counts every position.
        gating: holds the two weights.
    """
    experts = logits.shape[-1]
    weights, scores, flat = (t.reshape(-1, experts) for t in (gates.weights, gates.scores, logits))
    if tokens is not None:
        keep = tokens.reshape(-1)
        weights, scores, flat = weights[keep], scores[keep], flat[keep]
    share, mean = gating.load(gates._replace(weights=weights, scores=scores))
    loss = gating.balance * experts * (share * mean).sum()
    if gating.z_loss:
        loss = loss + gating.z_loss * torch.logsumexp(flat.to(scores.dtype), dim=-1).square().mean()
    return loss


def add_auxiliary_loss(gates: Gates, logits: Tensor, tokens: Tensor | None, gating: Gating) -> Gates:
    """``gates``, unchanged in value, that will also send back the gradient of `auxiliary_loss`."""
    if not torch.is_grad_enabled():
        return gates
    loss = auxiliary_loss(gates, logits, tokens, gating)
    return gates._replace(weights=_Inject.apply(gates.weights, loss))
