"""Unsloth, which cannot carry a mixture without somebody noticing.

Its GPU classes replace the forwards of attention, MLP, block and model. Decoding then reads the weight of a projection
instead of calling it, unless it is wrapped the way PEFT's LoRA wraps it, and loops over the blocks by itself. What a
mixture attaches there would never run, and the answers would silently be those of the base.
"""

from __future__ import annotations

from torch import nn


def refuse_unsloth(model: nn.Module) -> None:
    """Raise ValueError if a forward of ``model`` is Unsloth's; on a CPU, where it replaces none, there is none."""
    for name, module in model.named_modules():
        forward = getattr(module.forward, "__func__", module.forward)
        if str(getattr(forward, "__module__", "")).startswith("unsloth"):
            raise ValueError(
                f"Unsloth has replaced {type(module).__name__}.forward ({name or 'the model itself'}): it would pass "
                "the mixture by when it generates, and answer as the base does. Load the model with transformers "
                "(AutoModelForCausalLM.from_pretrained) in a process that does not import unsloth"
            )
