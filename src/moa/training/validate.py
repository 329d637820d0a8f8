"""Check a recipe without a download: build its model from shapes alone and count what would be trained."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from moa.adapters.experts import ExpertLayer
from moa.adapters.presets import adapter_config
from moa.adapters.routers import RouterLayer
from moa.models import config_of
from moa.training.recipe import Recipe


class Count(NamedTuple):
    """Parameters of a recipe's model.

    Attributes:
        total: of base and adapter together.
        trainable: of the adapter, without what its configuration keeps frozen.
        by_kind: of the adapter by expert kind, with ``router`` for routers and thresholds; frozen ones included.
    """

    total: int
    trainable: int
    by_kind: dict[str, int]

    @property
    def adapter(self) -> int:
        """All parameters that the adapter adds."""
        return sum(self.by_kind.values())


def validate(recipe: Recipe) -> Count:
    """Build the recipe's model on the meta device.

    Raises:
        ValueError: the base model's configuration cannot be had, or the adapter does not fit the model.
    """
    config = config_of(recipe.base)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model = get_peft_model(base, adapter_config(recipe.adapter))
    trainable, total = model.get_nb_trainable_parameters()
    return Count(total, trainable, count_by_kind(model))


def count_by_kind(model: nn.Module) -> dict[str, int]:
    """Adapter parameters of ``model`` by expert kind, and those of all routers as ``router``."""
    counts: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, RouterLayer | ExpertLayer):
            kind = module.config.kind if isinstance(module, ExpertLayer) else "router"
            own = [getattr(module, name) for name in module.adapter_layer_names]
            counts[kind] += sum(parameter.numel() for adapters in own for parameter in adapters.parameters())
    return {kind: number for kind, number in counts.items() if number}
