"""Parallel adapter: a gated bottleneck beside the feed-forward module, ``MLP(x) + g * (U act(D x + b) + c)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from moa.adapters import ops
from moa.adapters.architectures import Host
from moa.adapters.block import BlockContext
from moa.adapters.choices import check_choice, check_range
from moa.adapters.experts.base import ExpertConfig, ExpertLayer, Site, first_argument


@dataclass
class ParallelExpert(ExpertConfig):
    """A bottleneck that reads what the feed-forward module reads (He et al. 2022; official `llama.py:144-205`).

    Attributes:
        size: width of the bottleneck.
        activation: a name from transformers' ``ACT2FN``.
    """

    kind = "parallel"
    size: int = 16
    activation: str = "silu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("parallel expert: size", self.size, low=1)
        check_choice("parallel expert: activation", self.activation, list(ACT2FN))

    def sites(self) -> list[Site]:
        return [Site("parallel", "mlp")]


class UpProjection(nn.Module):
    """The second matrix: weight (out, copies * size) and one bias (copies, out) per copy. All zero: no output."""

    def __init__(self, size: int, out_features: int, copies: int, init_weights: bool):
        super().__init__()
        draw = torch.zeros if init_weights else torch.randn
        self.weight = nn.Parameter(draw(out_features, copies * size) * 0.02)
        self.bias = nn.Parameter(draw(copies, out_features) * 0.02)

    def forward(self, hidden: Tensor, weights: Tensor | None) -> Tensor:
        return ops.bottleneck(hidden, self.weight, self.bias, weights)


class ParallelLayer(ExpertLayer):
    """Weights: ``moa_down``, a linear layer to (copies *) size, and ``moa_up``, an `UpProjection`."""

    config = ParallelExpert
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("moa_down", "moa_up")
    other_param_names: ClassVar[tuple[str, ...]] = (*ExpertLayer.other_param_names, "activation")

    def __init__(self, site: str, host: Host, context: BlockContext):
        super().__init__(site, host, context)
        self.moa_down = nn.ModuleDict()
        self.moa_up = nn.ModuleDict()
        self.activation: dict[str, str] = {}
        self.add_hook(host.source, before=self._before_mlp)
        self.add_hook(host.module, after=self._after_mlp)

    def build(self, adapter: str, config: ParallelExpert, init_weights: bool) -> None:
        copies = config.copies
        self.activation[adapter] = config.activation
        rows = config.size if copies.shared else config.size * copies.number
        self.moa_down[adapter] = nn.Linear(self.place.in_features, rows)
        nn.init.zeros_(self.moa_down[adapter].bias)
        self.moa_up[adapter] = UpProjection(config.size, self.place.out_features, copies.number, init_weights)

    def _before_mlp(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.context.notes[id(self)] = first_argument(args, kwargs)

    def _after_mlp(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        hidden = self.context.notes.get(id(self))
        for adapter in self.enabled(self.moa_down):
            down = self.moa_down[adapter]
            x = self._cast_input_dtype(hidden, down.weight.dtype)
            bottleneck = ACT2FN[self.activation[adapter]](down(x))
            delta = self.moa_up[adapter](bottleneck, self.weights(adapter, x))
            first = first + delta.to(first.dtype).view_as(first)
        return (first, *output[1:]) if isinstance(output, tuple) else first
