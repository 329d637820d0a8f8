"""What every expert puts out before its gate, caught while the model runs.

Hooks see an expert's inner activation, from which its output follows by its last matrix; a prompt expert is asked
again, ungated, by a second guest in the same attention. For an expert with copies, each copy's output is known too,
before its weight. (IA)^3 rescales and adds nothing of its own, so it has no output here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moa.adapters.block import Mixture
from moa.adapters.experts import ExpertLayer
from moa.adapters.experts.lora import LoraLayer
from moa.adapters.experts.parallel import ParallelLayer
from moa.adapters.experts.prompt import PromptLayer
from moa.inspection.collect import copies_of, experts_of


class Output(NamedTuple):
    """One expert's output on the tokens of a forward, ungated.

    Attributes:
        whole: (tokens, features), its copies mixed by their own router.
        copies: (copies, tokens, features), before that router; None for one copy.
    """

    whole: Tensor
    copies: Tensor | None


Seen = dict[str, Tensor]


@contextmanager
def outputs_of(mixture: Mixture, adapter: str) -> Iterator[dict[str, Seen]]:
    """Watch a block's experts; hand what was seen to `output_of` after the forward."""
    seen: dict[str, Seen] = {}
    handles: list[Any] = []
    for layer in experts_of(mixture, adapter):
        notes = seen.setdefault(layer.site, {})
        handles += list(_watch(layer, adapter, notes))
        if isinstance(layer, PromptLayer):
            layer.host.add_module(_guest_name(layer), _Guest(layer, adapter, notes))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for layer in experts_of(mixture, adapter):
            layer.host._modules.pop(_guest_name(layer), None)


def output_of(layer: ExpertLayer, adapter: str, seen: Seen) -> Output | None:
    """An expert's output from what was seen of it; None for a kind that has none, or that did not run."""
    if "whole" in seen:
        return Output(_rows(seen["whole"]), None)
    if "inner" not in seen:
        return None
    if isinstance(layer, LoraLayer):
        copies = _by_copy(layer, adapter, seen["inner"], layer.moa_B[adapter].weight) * layer.scaling[adapter]
    else:
        up: Any = layer.moa_up[adapter]  # type: ignore[operator]
        copies = _by_copy(layer, adapter, seen["inner"], up.weight) + up.bias.float().unsqueeze(1)
    if "route" not in seen:
        return Output(copies[0], None)
    return Output(torch.einsum("tc,ctf->tf", _rows(seen["route"]), copies), copies)


def _watch(layer: ExpertLayer, adapter: str, seen: Seen) -> Iterator[Any]:
    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen["inner"] = output.detach()

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen["inner"] = args[0].detach()

    def routed(module: nn.Module, args: tuple[Any, ...], gates: Any) -> None:
        if args[1] == adapter:
            seen["route"] = gates.weights.detach()

    if isinstance(layer, LoraLayer):
        yield layer.moa_A[adapter].register_forward_hook(after)
    elif isinstance(layer, ParallelLayer):
        yield layer.moa_up[adapter].register_forward_pre_hook(before)
    copies = copies_of(layer, adapter)
    if copies is not None:
        yield copies.register_forward_hook(routed)


def _by_copy(layer: ExpertLayer, adapter: str, inner: Tensor, weight: Tensor) -> Tensor:
    """Inner activation (..., copies * width) or (..., width), weight (out, copies * width) -> (copies, tokens, out)."""
    copies = copies_of(layer, adapter)
    number = 1 if copies is None else copies.moa_w2[adapter].out_features
    columns = weight.detach().float().unflatten(-1, (number, -1))
    inner = _rows(inner)
    inner = inner.unflatten(-1, (inner.shape[-1] // columns.shape[-1], -1)).expand(-1, number, -1)
    return torch.einsum("tcw,fcw->ctf", inner, columns)


def _rows(values: Tensor) -> Tensor:
    return values.float().reshape(-1, values.shape[-1])


def _guest_name(layer: ExpertLayer) -> str:
    return f"inspected_{layer.site.replace('#', '_')}"


class _Guest(nn.Module):
    """Runs a prompt expert once more, on nothing and ungated, and leaves the attention's output as it is."""

    def __init__(self, layer: PromptLayer, adapter: str, seen: Seen):
        super().__init__()
        self.context = layer.context
        self._layer = (layer,)  # a tuple, so that nn.Module does not register it as a child
        self._adapter = adapter
        self._seen = seen

    def after_attention(self, attention: nn.Module, query: Tensor, scaling: float | None, output: Tensor) -> Tensor:
        (layer,) = self._layer
        gate, layer.output[self._adapter] = layer.output[self._adapter], None
        try:
            alone = layer.after_attention(attention, query, scaling, torch.zeros_like(output))
        finally:
            layer.output[self._adapter] = gate
        self._seen["whole"] = alone.detach().flatten(-2)
        return output
