"""(IA)^3 expert: a gated, learned rescaling of features, ``y * (1 + g * d)`` with one number of ``d`` per feature.

On k and v it rescales what the projection puts out, on down what the projection reads, which is the MLP's inner
activation. LoRA experts of the same configuration come first: their update of k and v is rescaled with it, and on down
they read the rescaled input. In families that normalise keys, k is rescaled before the norm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moa.adapters.context import first_argument
from moa.adapters.experts.base import ExpertConfig, ExpertLayer, Site
from moa.adapters.experts.forms import Rescaling as RescalingForm
from moa.adapters.low_rank import widen
from moa.choices import check_names

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

    def obstacle_to_splitting(self) -> str | None:
        return None


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
        return torch.matmul(weights.expand(*weights.shape[:-1], len(self.weight)), self.weight).to(self.weight.dtype)


class Ia3Layer(ExpertLayer):
    """Weights: ``moa_scale``, a `Rescaling` of the host's output (k, v) or of its input (down)."""

    config = Ia3Expert
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("moa_scale",)
    moa_scale: nn.ModuleDict

    def hook(self) -> None:
        self.reads = self.site.startswith("ia3_down")
        if self.reads:
            self.add_hook(self.host, before=self._before_host)
        else:
            super().hook()

    def build(self, adapter: str, config: Ia3Expert, init_weights: bool) -> None:
        features = self.place.in_features if self.reads else self.place.out_features
        self.moa_scale[adapter] = Rescaling(config.copies.number, features, init_weights)

    def split_along(self, adapter: str) -> dict[str, dict[str, int]]:
        return {"moa_scale": {"weight": 1} if self._rescales_share else {}}

    @property
    def _rescales_share(self) -> bool:
        return self.reads_share if self.reads else self.writes_share

    def form(self, adapter: str) -> RescalingForm:
        change = self.moa_scale[adapter].weight
        return RescalingForm(self.reads, change if self.reads else widen(change, self.place.part))  # type: ignore[arg-type]

    def update(self, adapter: str, x: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
        """In the wider dtype: in bfloat16, ``1 + change`` would lose what the expert learns."""
        if self.split is not None and weights is not None and self._rescales_share:
            weights = self.split.spread(weights)
        return y * self.moa_scale[adapter](weights)

    def _before_host(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = first_argument(args, kwargs)
        if not self._disable_adapters:
            x = self.add_all(self.context.now, x, x)
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {next(iter(kwargs)): x})
