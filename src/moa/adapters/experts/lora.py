"""LoRA expert: a gated low-rank update of one linear projection, ``y + g * scaling * B A x``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import nn

from moa.adapters.architectures import PROJECTIONS, Host
from moa.adapters.context import BlockContext
from moa.adapters.experts.base import ExpertConfig, ExpertLayer, Site
from moa.adapters.experts.bottleneck import BottleneckLayer, Factors
from moa.choices import check_flag, check_names, check_range


@dataclass
class LoraExpert(ExpertConfig):
    """LoRA on some projections of a block, each with a gate of its own.

    Attributes:
        targets: any of q, k, v, o, gate, up, down.
        r: rank.
        alpha: the update is scaled by alpha / r.
        rslora: scale by alpha / sqrt(r) instead (rsLoRA).
        dropout: on the input of A, while training.
    """

    kind = "lora"
    size_setting = "r"
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "o", "down"])
    r: int = 8
    alpha: float = 8
    rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("lora expert: r", self.r, low=1, whole=True)
        check_range("lora expert: alpha", self.alpha, low=0, open_low=True)
        check_flag("lora expert: rslora", self.rslora)
        check_range("lora expert: dropout", self.dropout, low=0, high=1)
        check_names("lora expert: targets", self.targets, PROJECTIONS)

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def sites(self) -> list[Site]:
        return [Site(target, target) for target in self.targets]

    def obstacle_to_splitting(self) -> str | None:
        if self.dropout:
            return f"each process would drop other numbers (dropout={self.dropout}, use 0)"
        return None

    def resized(self, size: int, **changes: Any) -> Self:
        """As every kind; alpha moves along, so that the scaling alpha / r stays what it was."""
        if not self.rslora:
            changes.setdefault("alpha", self.alpha / self.r * size)
        return super().resized(size, **changes)


class LoraLayer(BottleneckLayer):
    """Weights: ``moa_A`` (copies * r, in), or (r, in) if the copies share it; ``moa_B`` (out, copies * r)."""

    config = LoraExpert
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("moa_A", "moa_B", "moa_dropout")
    other_param_names: ClassVar[tuple[str, ...]] = (*ExpertLayer.other_param_names, "scaling")
    moa_A: nn.ModuleDict
    moa_B: nn.ModuleDict
    moa_dropout: nn.ModuleDict

    def __init__(self, site: str, host: Host, context: BlockContext):
        super().__init__(site, host, context)
        self.scaling: dict[str, float] = {}  # of the product; read anew at every call

    def build(self, adapter: str, config: LoraExpert, init_weights: bool) -> None:
        copies = config.copies
        self.scaling[adapter] = config.scaling
        in_rows = config.r if copies.shared else config.r * copies.number
        self.moa_A[adapter] = nn.Linear(self.place.in_features, in_rows, bias=False)
        self.moa_B[adapter] = nn.Linear(config.r * copies.number, self.place.out_features, bias=False)
        self.moa_dropout[adapter] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        nn.init.kaiming_uniform_(self.moa_A[adapter].weight, a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(self.moa_B[adapter].weight)

    def split_along(self, adapter: str) -> dict[str, dict[str, int]]:
        return {"moa_A": {"weight": 1} if self.reads_share else {}, "moa_B": {"weight": 0} if self.writes_share else {}}

    def factors(self, adapter: str) -> Factors:
        dropout = self.moa_dropout[adapter] if self.training else None
        return Factors(
            self.moa_A[adapter],  # type: ignore[arg-type]
            self.moa_B[adapter],
            scaling=self.scaling[adapter],
            dropout=dropout if isinstance(dropout, nn.Dropout) else None,
        )
