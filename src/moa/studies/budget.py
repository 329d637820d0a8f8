"""The budget solver: sizes of a method such that it trains a given number of parameters.

Parameters are counted on the model that PEFT builds, on the meta device (`moa.training.validate`), never by a formula:
the price of one step of each part is the difference of two counts, and the solution is counted again. Sizes keep the
proportions of the method's configuration, apart from rounding.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, NamedTuple

from moa.models import config_of
from moa.studies.methods import Method
from moa.studies.sizing import Sizable, Size, variants
from moa.training.recipe import Recipe
from moa.training.validate import validate


class Fit(NamedTuple):
    """A method at a budget.

    Attributes:
        section: the recipe's ``adapter`` section.
        trained: parameters that are trained, counted.
        sizes: part -> mean size over its units, for people.
    """

    section: dict[str, Any]
    trained: int
    sizes: dict[str, float]


def fit(method: Method, base: str, budget: int, *, tolerance: float = 0.01) -> Fit:
    """Size ``method`` on ``base`` to train ``budget`` parameters.

    Raises:
        ValueError: it cannot come within ``tolerance`` (relative); says what it can reach.
    """
    if not method.trains:
        return Fit({}, 0, {})
    reached, floors = [], []
    for variant in variants(method.section, method.grow, blocks_of(base)):
        ladder = Ladder(variant, base)
        found = ladder.solve(budget)
        if abs(found.trained - budget) <= tolerance * budget:
            return found
        reached.append(found.trained)
        floors.append(ladder.least)
    if (least := min(floors)) > budget:
        raise ValueError(f"cannot train as few as {budget:,} parameters: with all sizes at one it trains {least:,}")
    best = min(reached, key=lambda trained: abs(trained - budget))
    raise ValueError(f"cannot train {budget:,} parameters within {tolerance:.1%}: the nearest it reaches is {best:,}")


class Ladder:
    """What one more step of each part costs."""

    def __init__(self, method: Sizable, base: str):
        self.method = method
        self.base = base
        ones = [Size(1)] * len(method.parts)
        self.least = self.count(ones)
        self.costs = []
        for place, part in enumerate(method.parts):
            taller = [*ones[:place], Size(2), *ones[place + 1 :]]
            self.costs.append((self.count(taller) - self.least) / len(part.layers))

    def count(self, sizes: list[Size]) -> int:
        return count(json.dumps(self.method.section(sizes)), self.base)

    def solve(self, budget: int) -> Fit:
        """The sizes nearest to ``budget``, counted."""
        values = self._proportional(budget)
        left = budget - self._predicted(values)
        raised = [0] * len(values)
        # Coarse steps first: the fine ones then close the gap that is left.
        for place in sorted(range(len(values)), key=lambda place: -self.costs[place]):
            units = len(self.method.parts[place].layers)
            raised[place] = max(0, min(units, int(left // self.costs[place])))
            left -= raised[place] * self.costs[place]
        free = [place for place, part in enumerate(self.method.parts) if raised[place] < len(part.layers)]
        finest = min(free, key=lambda place: self.costs[place], default=None)
        if finest is not None and left > 0 and self.costs[finest] - left < left:
            raised[finest] += 1
        sizes = [Size(*pair) for pair in zip(values, raised, strict=True)]
        means = {
            part.name: size.value + size.raised / len(part.layers)
            for part, size in zip(self.method.parts, sizes, strict=True)
        }
        return Fit(self.method.section(sizes), self.count(sizes), means)

    def _predicted(self, values: list[int]) -> float:
        steps = zip(values, self.costs, self.method.parts, strict=True)
        return self.least + sum((value - 1) * cost * len(part.layers) for value, cost, part in steps)

    def _proportional(self, budget: int) -> list[int]:
        """The configured sizes times the largest factor that stays within the budget, rounded down, at least one."""

        def values(factor: float) -> list[int]:
            return [max(1, int(factor * part.configured)) for part in self.method.parts]

        low, high = 0.0, 1.0
        while self._predicted(values(high)) <= budget:
            low, high = high, 2 * high
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self._predicted(values(middle)) <= budget else (low, middle)
        return values(low)


@cache
def count(section: str, base: str) -> int:
    """Trained parameters of an adapter section (as JSON) on ``base``."""
    return validate(Recipe(base=base, adapter=json.loads(section))).trainable


@cache
def blocks_of(base: str) -> int:
    """How many decoder blocks a base model has."""
    return int(config_of(base).get_text_config().num_hidden_layers)
