"""Not keeping for backward what one pass over memory makes again: activations of MLPs, and what RMS norms put out.

Autograd keeps, of ``silu(gate) * up``, the gate, its activation and ``up``; an expert on ``down`` then keeps the
product besides, and one on q, k or v what the norm made of ``h``, which the norm keeps itself. Inside of a routed block
a hook on saved tensors recognises such tensors by the function that made them and keeps a recipe instead: which
tensors, that are kept anyway, to apply which function to. It works for every family whose MLP is written with torch's
activations, whoever made its linear layers, and hands everything else to the hooks that were there before.

Off under activation checkpointing, which keeps nothing of a block anyway and counts what is saved, and while compiling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moa import _hosts

# What autograd calls an activation's derivative -> the activation, given the node that knows its arguments.
ACTIVATIONS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "SiluBackward0": lambda node: F.silu,
    "GeluBackward0": lambda node: lambda x: F.gelu(x, approximate=_hosts.saved(node, "approximate")),
}


class Recipe(NamedTuple):
    """A tensor that can be made again: a function, and what it is applied to, as the outer hooks packed it."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]


class Saver:
    """A pair of hooks on saved tensors, on top of ``outer``."""

    def __init__(self, outer: tuple[Any, Any] | None):
        self._pack: Callable[[Tensor], Any] = outer[0] if outer else _keep
        self._unpack: Callable[[Any], Any] = outer[1] if outer else _kept

    def pack(self, tensor: Tensor) -> Any:
        recipe = recipe_of(tensor)
        if recipe is None:
            return self._pack(tensor)
        return recipe._replace(arguments=tuple(self._pack(argument) for argument in recipe.arguments))

    def unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, Recipe):
            return self._unpack(packed)  # type: ignore[no-any-return]
        with torch.no_grad():
            return packed.function(*(self._unpack(argument) for argument in packed.arguments))


def _keep(tensor: Tensor) -> tuple[Tensor, int]:
    """Without its history (of an output, that would be a circle) and with its version: autograd counts no more where
    there are hooks.
    """
    return tensor.detach(), _hosts.version(tensor)


def _kept(packed: tuple[Tensor, int]) -> Tensor:
    tensor, version = packed
    if _hosts.version(tensor) != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"a tensor of shape {list(tensor.shape)} that a decoder block keeps for backward"
        )
    return tensor


def recipe_of(tensor: Tensor) -> Recipe | None:
    """How to make ``tensor`` of what autograd keeps anyway; None if it is not the kind that is worth it."""
    node = tensor.grad_fn
    if node is None or _hosts.version(tensor):  # changed in place since, which no function would make again
        return None
    name = node.name()
    if name in ACTIVATIONS:
        return Recipe(ACTIVATIONS[name](node), (_hosts.saved(node, "self"),))
    if name != "MulBackward0":
        return None
    (left, _), (right, _) = node.next_functions
    for side, saved_of, other in ((left, "self", "other"), (right, "other", "self")):
        if side is None:
            continue
        factor = _hosts.saved(node, other)
        if factor is None:
            continue
        if side.name() in ACTIVATIONS:
            activation, gate = ACTIVATIONS[side.name()](side), _hosts.saved(side, "self")
            return Recipe(lambda gate, up, act=activation: act(gate).mul_(up), (gate, factor))
        if _hosts.saved(node, saved_of) is None:  # a frozen factor: of a norm, if it scales rows
            rows = side.next_functions[0][0] if side.name() == "ToCopyBackward0" else side
            if rows is not None and rows.name() == "MulBackward0":
                h, scale = _hosts.saved(rows, "self"), _hosts.saved(rows, "other")
                if h is not None and scale is not None and scale.shape[-1] == 1 and h.shape == tensor.shape:
                    dtype = tensor.dtype
                    return Recipe(lambda w, h, s, dtype=dtype: (h * s).to(dtype).mul_(w), (factor, h, scale))
    return None


def rematerialised() -> Any:
    """A context inside of which the block's forward saves less."""
    outer = _hosts.saved_tensor_hooks()
    if outer is not None and getattr(outer[0], "__module__", "").startswith("torch.utils.checkpoint"):
        return contextlib.nullcontext()
    saver = Saver(outer)
    return torch.autograd.graph.saved_tensors_hooks(saver.pack, saver.unpack)
