"""(IA)^3 expert: a gated, learned rescaling of features, ``y * (1 + g * d)`` with one number of ``d`` per feature.

On k and v it rescales what the projection puts out, on down what the projection reads, which is the MLP's inner
activation. LoRA experts of the same configuration come first: their update of k and v is rescaled with it, and on down
they read the rescaled input. In families that normalise keys, k is rescaled before the norm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moa.adapters.architectures import Host
from moa.adapters.block import BlockContext
from moa.adapters.choices import check_names
from moa.adapters.experts.base import ExpertConfig, ExpertLayer, Site, first_argument

TARGETS = ("k", "v", "down")


@dataclass
class Ia3Expert(ExpertConfig):
    """Learned rescaling of keys, values and the MLP's inner activation (Liu et al. 2022, section 3.3).

    Attributes:
        targets: any of k, v, down.
    """

    kind = "ia3"
    targets: list[str] = field(default_factory=lambda: list(TARGETS))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("ia3 expert: targets", self.targets, TARGETS)
        if self.copies.shared:
            raise ValueError("ia3 expert: copies with shared=True have no first matrix to share; use shared=False")

    def sites(self) -> list[Site]:
        return [Site(f"ia3_{target}", target) for target in self.targets]


class Rescaling(nn.Module):
    """One number per copy and feature, weight (copies, features). All zero: nothing is rescaled."""

    def __init__(self, copies: int, features: int, init_weights: bool):
        super().__init__()
        draw = torch.zeros if init_weights else torch.randn
        self.weight = nn.Parameter(draw(copies, features) * 0.02)

    def forward(self, weights: Tensor | None) -> Tensor:
        """Weights (..., copies), or None for one -> the relative change (..., features)."""
        if weights is None:
            return self.weight.sum(0)
        return torch.matmul(weights, self.weight).to(self.weight.dtype)


class Ia3Layer(ExpertLayer):
    """Weights: ``moa_scale``, a `Rescaling` of the host's output (k, v) or of its input (down)."""

    config = Ia3Expert
    adapter_layer_names = ("moa_scale",)

    def __init__(self, site: str, host: Host, context: BlockContext):
        super().__init__(site, host, context)
        self.moa_scale = nn.ModuleDict()
        self.reads = site.startswith("ia3_down")
        if self.reads:
            self.add_hook(host.module, before=self._before_projection)
        else:
            self.add_hook(host.module, after=self._after_projection)

    def build(self, adapter: str, config: Ia3Expert, init_weights: bool) -> None:
        features = self.place.in_features if self.reads else self.place.out_features
        self.moa_scale[adapter] = Rescaling(config.copies.number, features, init_weights)

    def _before_projection(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_argument(args, kwargs)
        for adapter in self.enabled(self.moa_scale):
            x = _rescale(x, self._change(adapter, x))
        if args:
            return (x, *args[1:]), kwargs
        return args, kwargs | {next(iter(kwargs)): x}

    def _after_projection(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        if self.context.bypassed:
            return output
        for adapter in self.enabled(self.moa_scale):
            change = self._change(adapter, first_argument(args, kwargs))
            output = _rescale(output, self.in_place_of_part(change))
        return output

    def _change(self, adapter: str, x: Tensor) -> Tensor:
        scale = self.moa_scale[adapter]
        return scale(self.weights(adapter, self._cast_input_dtype(x, scale.weight.dtype)))


def _rescale(x: Tensor, change: Tensor) -> Tensor:
    """``x * (1 + change)`` in the wider dtype: in bf16, ``1 + change`` would lose what the expert learns."""
    return (x * (1 + change)).to(x.dtype)
