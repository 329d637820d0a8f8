"""The trade-off between lengths: epsilon-constraint sweep and the plans that no other plan beats.

First every loss is minimised alone, which gives the range of every loss. Then each loss in turn is minimised while the
others are held inside of one interval of their ranges, for every combination of intervals (Mixture of Attention spans,
arXiv 2406.14909, appendix E.3.2; ``optimizer.py:133-286`` of the official code, which cuts ranges into four).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moa.spans.search.program import Array, Choice, Program
from moa.spans.search.solution import Goal, Solution

Solver = Callable[[Goal], Solution | None]


@dataclass(frozen=True)
class Point:
    """A plan on the front.

    Attributes:
        choice: (layers, KV heads) rule numbers.
        losses: (lengths,) its losses.
        objective: place of the length whose loss was minimised.
        bound: certified lower bound of that loss within the boxes it was minimised in.
    """

    choice: Choice
    losses: Array
    objective: int
    bound: float

    @property
    def gap(self) -> float:
        """`Solution.gap` of the minimised loss."""
        return Solution(self.choice, float(self.losses[self.objective]), self.bound).gap


def sweep(
    program: Program, solve: Solver, intervals: int = 4, progress: Callable[[int, int], None] | None = None
) -> list[Point]:
    """All plans of the sweep that no other one beats, by loss at the first length.

    Args:
        program: the program.
        solve: a solver; None where there is no plan.
        intervals: pieces of every range.
        progress: called with finished and all goals, at the start and after every goal.

    Raises:
        ValueError: no plan keeps the densities; says what the rules allow.
    """
    count = len(program.lengths)
    # One loss has no trade-off; several are swept one by one within the intervals of the others.
    total = count if count == 1 else count + count * intervals ** (count - 1)
    notify = progress or (lambda done, total: None)
    points: list[Point] = []
    for done in range(count):
        notify(done, total)
        found = solve(Goal.alone(program, done))
        if found is None:
            raise ValueError(_no_plan(program))
        points.append(_point(program, found, done))
    if count > 1:
        table = np.stack([point.losses for point in points])
        goals = _goals(table.diagonal(), table.max(0), intervals)
        for done, goal in enumerate(goals, start=count):
            notify(done, total)
            found = solve(goal)
            if found is not None:
                points.append(_point(program, found, goal.objective))
    notify(total, total)
    return front(points)


def _goals(least: Array, greatest: Array, intervals: int) -> Iterator[Goal]:
    edges = np.linspace(least, greatest, intervals + 1)
    count = len(least)
    for objective in range(count):
        others = [place for place in range(count) if place != objective]
        for cells in itertools.product(range(intervals), repeat=len(others)):
            low, high = np.full(count, -np.inf), np.full(count, np.inf)
            for place, cell in zip(others, cells, strict=True):
                low[place], high[place] = edges[cell, place], edges[cell + 1, place]
            yield Goal(objective, low, high)


def front(points: Sequence[Point]) -> list[Point]:
    """Distinct points that no other one beats, by loss at the first length; of equal ones the first stays."""
    kept: list[Point] = []
    for point in points:
        if not any(_at_least_as_good(other, point) for other in kept):
            kept = [other for other in kept if not _at_least_as_good(point, other)]
            kept.append(point)
    return sorted(kept, key=lambda point: tuple(point.losses))


def _at_least_as_good(one: Point, other: Point) -> bool:
    """Everywhere, up to what sums of floats differ by."""
    room = 1e-9 * np.maximum(np.abs(one.losses), np.abs(other.losses))
    return bool((one.losses <= other.losses + room).all())


def _point(program: Program, found: Solution, objective: int) -> Point:
    if (problem := program.broken(found.choice)) is not None:
        raise RuntimeError(f"the solver's rounded plan is wrong: {problem}")
    return Point(found.choice, program.loss(found.choice), objective, found.bound)


def _no_plan(program: Program) -> str:
    said = ", ".join(
        f"{low:.3f} to {high:.3f} at {length} (rules keep {shares.min():.3f} to {shares.max():.3f})"
        for length, low, high, shares in zip(
            program.constrained, program.floor, program.ceiling, program.shares, strict=True
        )
    )
    return f"no plan was found with these mean KV densities: {said}; change density, floor, or the grid's step"
