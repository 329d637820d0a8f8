"""Adapters: a gated bottleneck with an activation, ``y + g * (U act(D x + b) + c)``, at one of two places.

- ``parallel``: beside the feed-forward module, ``y = MLP(x)`` (He et al. 2022).
- ``adapter``: serial, behind attention, ``x = y`` (Houlsby et al. 2019; Pfeiffer et al. 2021): it reads what it adds
  to, after attention's output projection and before the residual stream. LoRA experts on that projection come first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from transformers.activations import ACT2FN

from moa.adapters.architectures import Host
from moa.adapters.context import BlockContext, Forward
from moa.adapters.experts.base import ExpertConfig, ExpertLayer, Site
from moa.adapters.experts.bottleneck import BottleneckLayer, Factors, UpProjection
from moa.adapters.experts.forms import Reads
from moa.choices import check_choice, check_range

WITH_WEIGHTS = ("prelu", "xielu")
"""Activations that transformers knows and that have weights of their own, which nobody would train or save."""

ACTIVATIONS = [name for name in ACT2FN if name not in WITH_WEIGHTS]


@dataclass
class ParallelExpert(ExpertConfig):
    """A bottleneck that reads what the feed-forward module reads (He et al. 2022; official `llama.py:144-205`).

    Attributes:
        size: width of the bottleneck.
        activation: a name from transformers' ``ACT2FN``, of a function without weights of its own.
    """

    kind = "parallel"
    size_setting = "size"
    size: int = 16
    activation: str = "silu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(f"{self.kind} expert: size", self.size, low=1, whole=True)
        check_choice(f"{self.kind} expert: activation", self.activation, ACTIVATIONS)

    def sites(self) -> list[Site]:
        return [Site("parallel", "mlp")]

    def obstacle_to_splitting(self) -> str | None:
        return None


@dataclass
class AdapterExpert(ParallelExpert):
    """A bottleneck behind attention, which reads attention's output (Houlsby et al. 2019).

    Attributes:
        size: width of the bottleneck.
        activation: a name from transformers' ``ACT2FN``, of a function without weights of its own.
    """

    kind = "adapter"

    def sites(self) -> list[Site]:
        return [Site("adapter", "attention")]


class ParallelLayer(BottleneckLayer):
    """Weights: ``moa_down``, a linear layer to (copies *) size, and ``moa_up``, an `UpProjection`."""

    config = ParallelExpert
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("moa_down", "moa_up")
    other_param_names: ClassVar[tuple[str, ...]] = (*ExpertLayer.other_param_names, "activation")
    moa_down: nn.ModuleDict
    moa_up: nn.ModuleDict

    def __init__(self, site: str, host: Host, context: BlockContext):
        super().__init__(site, host, context)
        self.activation: dict[str, Callable[[Tensor], Tensor]] = {}

    def build(self, adapter: str, config: ParallelExpert, init_weights: bool) -> None:
        copies = config.copies
        self.activation[adapter] = ACT2FN[config.activation]
        in_rows = config.size if copies.shared else config.size * copies.number
        self.moa_down[adapter] = nn.Linear(self.in_features, in_rows)
        nn.init.zeros_(self.moa_down[adapter].bias)
        self.moa_up[adapter] = UpProjection(config.size, self.place.out_features, copies.number, init_weights)

    def split_along(self, adapter: str) -> dict[str, dict[str, int]]:
        """Both matrices are whole beside an MLP or behind attention, which read and put out whole features."""
        down, up = {"weight": 1}, {"weight": 0, "bias": 1}
        return {"moa_down": down if self.reads_share else {}, "moa_up": up if self.writes_share else {}}

    def factors(self, adapter: str) -> Factors:
        return Factors(
            self.moa_down[adapter],  # type: ignore[arg-type]
            self.moa_up[adapter],
            activation=self.activation[adapter],
        )


class AdapterLayer(ParallelLayer):
    """The same weights, from and to the width of attention's output."""

    config = AdapterExpert
    reads = Reads.OUTPUT

    def apply_to(self, now: Forward, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Out of place: ``y`` is also ``x``, which backward needs as it was."""
        return ExpertLayer.apply_to(self, now, adapter, x, y)
