"""What every solver of a span program takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moa.spans.search.program import Array, Choice, Program


@dataclass(frozen=True)
class Goal:
    """Minimise the loss at one length, with every loss inside of a box.

    Attributes:
        objective: place of the length in ``Program.lengths``.
        low: (lengths,) least losses; -inf where there is no bound.
        high: (lengths,) greatest losses; inf where there is no bound.
    """

    objective: int
    low: Array
    high: Array

    @classmethod
    def alone(cls, program: Program, objective: int) -> Goal:
        """One objective without boxes."""
        free = np.full(len(program.lengths), np.inf)
        return cls(objective, -free, free)


class Solution(NamedTuple):
    """A plan that keeps every constraint, and a bound that no plan can beat.

    Attributes:
        choice: (layers, KV heads) rule numbers.
        value: its loss at the goal's length.
        bound: certified lower bound of that loss over all plans that meet the goal.
    """

    choice: Choice
    value: float
    bound: float

    @property
    def gap(self) -> float:
        """How far the value can be from the best one, as a share of the value."""
        return max(self.value - self.bound, 0.0) / max(abs(self.value), 1e-300)


def coupling(program: Program, goal: Goal) -> tuple[Array, Array]:
    """Coefficients and bounds of all coupling constraints, as ``sum(rows * x) <= bounds``.

    Returns:
        rows: (constraints, layers, KV heads, rules), scaled so that a whole plan's sum is of the order of one.
        bounds: (constraints,).
    """
    layers, heads, count = program.shape
    shares = np.broadcast_to(
        program.shares[:, None, None, :] / (layers * heads), (len(program.constrained), layers, heads, count)
    )
    rows = [shares, -shares]
    bounds = [program.ceiling, -program.floor]
    for place, (low, high) in enumerate(zip(goal.low, goal.high, strict=True)):
        scale = max(abs(edge) for edge in (low, high, 1e-12) if np.isfinite(edge))
        for sign, edge in ((1, high), (-1, low)):
            if np.isfinite(edge):
                rows.append(sign * program.losses[place][None] / scale)
                bounds.append(np.array([sign * edge / scale]))
    return np.concatenate(rows), np.concatenate(bounds)
