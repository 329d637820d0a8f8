"""What a quantised base must not have gone through before training."""

from __future__ import annotations

from torch import nn


def check_not_packed(model: nn.Module) -> None:
    """Refuse a base whose 4-bit weights bitsandbytes has repacked for inference on a CPU.

    It does so in the first forward in evaluation mode whose input needs no gradient, and keeps them so. No gradient
    passes through packed weights, so experts below the last block would learn nothing, without an error.

    Raises:
        ValueError: naming the first packed module.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"the 4-bit weights of {name!r} are packed for inference on the CPU, and no gradient passes through "
                "them: bitsandbytes packs when the model runs in evaluation mode before training. Load the base again "
                "and train it before it is evaluated"
            )
