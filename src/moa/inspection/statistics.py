"""From gates to the numbers of a report."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moa.adapters.gating import Gating, Softmax
from moa.adapters.telemetry import Decisions, Place, is_dead
from moa.inspection.collect import RouterFacts
from moa.inspection.results import RouterStatistics

SOFT_LEVEL = 0.1
"""A gate that is never 0 counts as used above this level."""


def level_of(gating: Gating, columns: int) -> float:
    """Above which gate an expert counts as used.

    0 for rules that switch experts off. `SOFT_LEVEL` for independent sigmoids. For a softmax, whose gates shrink with
    the number of experts, half of an equal share.
    """
    if gating.selects:
        return 0.0
    return 0.5 / columns if isinstance(gating, Softmax) else SOFT_LEVEL


def statistics(place: Place, facts: RouterFacts, found: Decisions) -> RouterStatistics:
    """Summarise one router's decisions on (tokens, columns) gates."""
    gates, threshold = found
    level = level_of(facts.gating, len(facts.columns))
    speaking = (gates != 0).any(-1)
    mean, active = _share(gates), _share(gates != 0)
    winners = torch.nn.functional.one_hot(gates.argmax(-1), len(facts.columns)) * speaking.unsqueeze(-1)
    return RouterStatistics(
        block=place.block,
        site=place.site,
        columns=facts.columns,
        tokens=len(gates),
        mean=mean,
        active=active,
        used=_share(gates > level),
        strongest=_share(winners),
        level=level,
        entropy=mean_entropy(gates[speaking]),
        silent=1 - float(speaking.double().mean()),
        threshold=None if threshold is None else _mean_and_deviation(threshold.double()),
        dead=[name for name, gate, share in zip(facts.columns, mean, active, strict=True) if is_dead(gate, share)],
    )


def mean_entropy(gates: Tensor) -> float | None:
    """Mean over tokens of the entropy of (tokens, columns) gates, each token's divided by their sum, in [0, 1]."""
    if not len(gates) or gates.shape[-1] == 1:
        return None
    shares = gates.double() / gates.double().sum(-1, keepdim=True)
    return float(torch.special.entr(shares).sum(-1).mean()) / math.log(gates.shape[-1])


def _share(values: Tensor) -> list[float]:
    return [float(value) for value in values.double().mean(0)]


def _mean_and_deviation(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std(correction=0))
