"""Finding what a model's mixtures are made of."""

from __future__ import annotations

from torch import nn

from moa.adapters.block import Mixture
from moa.adapters.experts.base import ExpertLayer, column_position


def mixtures_of(model: nn.Module) -> list[Mixture]:
    """The model's mixtures in the order of their blocks."""
    return sorted((m for m in model.modules() if isinstance(m, Mixture)), key=lambda mixture: mixture.index)


def experts_of(mixture: Mixture, adapter: str) -> list[ExpertLayer]:
    """The experts of one adapter in a mixture's block, in the order of their gate columns."""
    layers = [m for m in mixture.host.modules() if isinstance(m, ExpertLayer) and adapter in m.output]
    return sorted(layers, key=lambda layer: column_position(layer.site))


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that are active and have an expert or a router in some block."""
    return sorted(
        {
            name
            for mixture in mixtures_of(model)
            for name in mixture.active_adapters
            if name in mixture.router or experts_of(mixture, name)
        }
    )
