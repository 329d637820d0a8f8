"""Base layers that let no gradient through: experts before them would learn nothing, without an error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def check_gradient(site: str, host: nn.Module, x: Tensor, y: Tensor) -> None:
    """Refuse to train past a layer that cuts what it puts out off from its input.

    Args:
        site: where in its block the layer is.
        host: the base's layer.
        x: what it read.
        y: what it put out.

    Raises:
        ValueError: a gradient is asked for and does not pass; names the layer and the cause.
    """
    if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
        weights = [getattr(layer, "weight", None) for layer in host.modules()]
        kinds = sorted({type(weight).__name__ for weight in weights if isinstance(weight, Tensor)})
        raise ValueError(
            f"no gradient passes through the base's layer at {site!r} ({type(host).__name__} of {', '.join(kinds)}): "
            "its weights are in a form for inference. torchao's dynamic int8 always is, GPTQ's after the model ran in "
            "evaluation mode: load the base again and train it before it is evaluated, or quantise weights only"
        )


def four_bit_layers(block: nn.Module) -> list[nn.Module]:
    """The layers of a block that bitsandbytes keeps in 4 bits."""
    return [
        layer for layer in block.modules() if getattr(getattr(layer, "weight", None), "quant_state", None) is not None
    ]


def check_not_packed(layers: Sequence[nn.Module], block: int) -> None:
    """Refuse to train on 4-bit weights that bitsandbytes has repacked for inference on a CPU.

    It does so in the first forward in evaluation mode whose input needs no gradient, and they stay so. What such a
    layer puts out looks as if a gradient passed, but none does. Unpacking gives back other numbers than there were.

    Raises:
        ValueError: naming the block.
    """
    for layer in layers:
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):  # type: ignore[union-attr]
            raise ValueError(
                f"no gradient passes through the 4-bit weights of block {block}: bitsandbytes has packed them for "
                "inference on the CPU, which it does when a model runs in evaluation mode before it is trained. Load "
                "the base again, and train it before it is evaluated (no eval_on_start)"
            )
