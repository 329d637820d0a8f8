"""Search: from attention influence to the span plans that trade one length's loss against another's best.

Losses, densities and the plan itself go by one span function (`moa.spans.rule.span`), per real KV head. Every plan is
checked once more as written, from its own rules, before it is given out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from moa.spans.journal import Journal
from moa.spans.plan import SpanPlan
from moa.spans.rule import Rule
from moa.spans.search.grid import rules
from moa.spans.search.pareto import Point, Solver, sweep
from moa.spans.search.pricing import Pricing
from moa.spans.search.program import Program, native, program
from moa.spans.search.solution import Goal, Solution
from moa.spans.search.whole import solve_whole
from moa.versions import versions

WHOLE = 4000  # binaries that HiGHS solves as they are
FULL = Rule(0.0, 1.0)


@dataclass(frozen=True)
class Limits:
    """What a plan must keep, and what it may choose from.

    Attributes:
        density: greatest mean share of the dense KV cache, at every length.
        floor: least mean density, as a share of ``density``; keeps the search from plans that only look good because
            the first-order loss says nothing about very short spans.
        extend: lengths in tokens that are bounded but not profiled.
        rules_per_layer: most distinct rules in a layer, 1 to 3; the cache groups heads by rule.
        step: tokens between offsets of the grid.
        slopes: slopes of the grid, evenly from 0 to 1.
        intervals: pieces that a loss's range is cut into; more make a finer front and take longer.
        sink: first tokens that every head keeps, inside of its span.
        block: granularity in tokens.
        tolerance: relative gap at which a solver may stop.
        seconds: after which HiGHS alone gives way to pricing, per goal.
    """

    density: float = 0.5
    floor: float = 0.9
    extend: tuple[int, ...] = ()
    rules_per_layer: int = 2
    step: int = 1024
    slopes: int = 9
    intervals: int = 4
    sink: int = 64
    block: int = 64
    tolerance: float = 0.005
    seconds: float = 60.0


@dataclass(frozen=True)
class Candidate:
    """A plan on the Pareto front.

    Attributes:
        plan: ready to be applied; its ``searched`` holds everything below.
        losses: length to dropped influence.
        densities: length to mean KV density over the searched layers.
        minimised: the length whose loss was minimised.
        gap: certified: no plan within the same boxes has a loss lower by more than this share.
    """

    plan: SpanPlan
    losses: dict[int, float]
    densities: dict[int, float]
    minimised: int
    gap: float


def search(
    influences: Mapping[int, Tensor],
    limits: Limits | None = None,
    *,
    layers: Sequence[int] | None = None,
    model: str | None = None,
    evidence: Mapping[str, object] | None = None,
    save_to: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Candidate]:
    """Find the plans that no other plan beats at every length.

    Args:
        influences: length in tokens to (layers, KV heads, blocks, blocks) mean influence.
        limits: bounds and grid.
        layers: layers that get spans; the others keep everything they see now (a sliding window of their own) and do
            not count. None: all.
        model: id of the model, for the plan.
        evidence: what else to record in the plan.
        save_to: a journal of solved goals, so that a killed search goes on.
        progress: called with finished and all goals.

    Returns:
        The front, by loss at the shortest length.

    Raises:
        ValueError: inputs that do not fit together, or bounds that no plan can keep.
    """
    limits = limits or Limits()
    shape = next(iter(influences.values())).shape if influences else (0, 0)
    searched = list(range(shape[0])) if layers is None else list(layers)
    if not searched:
        raise ValueError("no layer to search: every layer of the model has a window of its own")
    problem = program(
        {length: influence[searched] for length, influence in influences.items()},
        rules(sorted(influences), limits.extend, step=limits.step, slopes=limits.slopes),
        native(limits.sink, limits.block),
        {length: limits.density for length in [*influences, *limits.extend]},
        block=limits.block,
        floor=limits.floor,
        limit=limits.rules_per_layer,
    )
    solve = solver(problem, limits.tolerance, limits.seconds)
    if save_to is not None:
        totals = {str(length): float(influence.double().abs().sum()) for length, influence in influences.items()}
        solve = _recorded(solve, Journal(save_to, {"limits": asdict(limits), "layers": searched, "influence": totals}))
    points = sweep(problem, solve, limits.intervals, progress)
    said = {"limits": asdict(limits), "versions": versions("torch", "transformers", "scipy"), **(evidence or {})}
    return [_candidate(point, problem, searched, shape[0], limits, model, said) for point in points]


def solver(problem: Program, tolerance: float = 0.005, seconds: float = 60.0) -> Solver:
    """The whole program in HiGHS for few heads; pricing for many, or where HiGHS alone takes too long."""
    pricing: list[Pricing] = []

    def solve(goal: Goal) -> Solution | None:
        found = None
        if np.prod(problem.shape) <= WHOLE:
            found = solve_whole(problem, goal, tolerance=tolerance, seconds=seconds)
            if found is None or found.gap <= tolerance:
                return found
        if not pricing:
            pricing.append(Pricing(problem, tolerance))
        priced = pricing[0].solve(goal)
        if found is None or priced is None:
            return found or priced
        best = min(found, priced, key=lambda solution: solution.value)
        return best._replace(bound=max(found.bound, priced.bound))

    return solve


def _recorded(solve: Solver, journal: Journal) -> Solver:
    """A solver that answers from the journal what was solved before, in the same order."""
    known = iter(list(journal.entries))

    def recorded(goal: Goal) -> Solution | None:
        if (entry := next(known, None)) is not None:
            if entry.get("choice") is None:
                return None
            return Solution(np.array(entry["choice"]), float(entry["value"]), float(entry["bound"]))
        found = solve(goal)
        journal.append(
            {"choice": found and found.choice.tolist(), "value": found and found.value, "bound": found and found.bound}
        )
        return found

    return recorded


def _candidate(
    point: Point,
    problem: Program,
    searched: Sequence[int],
    layers: int,
    limits: Limits,
    model: str | None,
    said: Mapping[str, object],
) -> Candidate:
    rows = [[FULL] * point.choice.shape[1] for _ in range(layers)]
    for layer, choice in zip(searched, point.choice, strict=True):
        rows[layer] = [problem.rules[number] for number in choice]
    plan = SpanPlan(
        [[rule.alpha for rule in row] for row in rows],
        [[rule.beta for rule in row] for row in rows],
        sink=limits.sink,
        block=limits.block,
        model=model,
    )
    densities = verify(plan, problem, searched)
    losses = dict(zip(problem.lengths, point.losses.tolist(), strict=True))
    minimised = problem.lengths[point.objective]
    plan.searched = {
        "losses": {str(length): loss for length, loss in losses.items()},
        "kv_density": {str(length): density for length, density in densities.items()},
        "minimised": minimised,
        "certified_gap": point.gap,
        "layers": list(searched),
        **said,
    }
    return Candidate(plan, losses, densities, minimised, point.gap)


def verify(plan: SpanPlan, problem: Program, searched: Sequence[int]) -> dict[int, float]:
    """Check a plan as it is written against every constraint; gives its mean KV density by length.

    Raises:
        RuntimeError: it breaks one; names it.
    """
    densities = {}
    for length, low, high in zip(problem.constrained, problem.floor, problem.ceiling, strict=True):
        spans = plan.spans(length)
        density = float(np.mean([spans[layer] for layer in searched])) / length
        if not low - 1e-9 <= density <= high + 1e-9:
            raise RuntimeError(f"the written plan keeps {density:.4f} at length {length}, not {low:.4f} to {high:.4f}")
        densities[length] = density
    for layer in searched:
        if (count := len(set(plan.rules()[layer]))) > problem.limit:
            raise RuntimeError(f"the written plan has {count} rules in layer {layer}, more than {problem.limit}")
    return densities
