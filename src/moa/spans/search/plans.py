"""Search: from attention influence to the span plans that trade one length's loss against another's best.

Losses, densities and the plan itself go by one span function (`moa.spans.rule.span`), per real KV head. Every plan is
checked once more as written, from its own rules, before it is given out.

Influence is an estimate, so plans of simpler kinds stand beside the searched ones (`rivals`): whoever chooses, chooses
among all by what the model then answers (`moa.spans.evidence.validation`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from moa.spans.baselines import two_class, uniform_window
from moa.spans.journal import Journal
from moa.spans.model import ModelShape
from moa.spans.plan import SpanPlan
from moa.spans.rule import Rule
from moa.spans.search.grid import rules
from moa.spans.search.pareto import Solver, sweep
from moa.spans.search.pricing import Pricing
from moa.spans.search.program import Choice, Program, native, program
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
        extend: lengths in tokens that are bounded but not profiled; above the profiled ones they count as stretched
            texts of the longest (`moa.spans.search.program.program`).
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
    intervals: int = 2
    sink: int = 64
    block: int = 64
    tolerance: float = 0.005
    seconds: float = 60.0


@dataclass(frozen=True)
class Candidate:
    """A plan to choose.

    Attributes:
        plan: ready to be applied; its ``searched`` holds what is below, and of a searched plan for which length the
            loss was minimised and the solver's certified gap. The gap is one of the program solved, whose losses are
            estimates: it says nothing of the plan's quality.
        kind: "searched", or a rival's.
        losses: length to dropped influence.
        densities: length to mean KV density over the searched layers.
    """

    plan: SpanPlan
    kind: str
    losses: dict[int, float]
    densities: dict[int, float]


def search(
    influences: Mapping[int, Tensor],
    limits: Limits | None = None,
    *,
    layers: Sequence[int] | None = None,
    model: str | None = None,
    embeddings: str | None = None,
    evidence: Mapping[str, object] | None = None,
    save_to: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Candidate]:
    """Find the plans that no other plan beats at every length.

    Args:
        influences: length in tokens to (layers, KV heads, blocks, blocks) mean influence, not negative.
        limits: bounds and grid.
        layers: layers that get spans; the others keep everything they see now (a sliding window of their own) and do
            not count. None: all.
        model: id of the model, for the plan.
        embeddings: `moa.spans.model.family` of the model, for the plan.
        evidence: what else to record in the plan.
        save_to: a journal of solved goals, so that a killed search goes on.
        progress: called with finished and all goals.

    Returns:
        The front, by loss at the shortest length.

    Raises:
        ValueError: inputs that do not fit together, or bounds that no plan can keep.
    """
    limits = limits or Limits()
    searched = _searched(influences, layers)
    grid = rules(sorted(influences), limits.extend, step=limits.step, slopes=limits.slopes)
    problem = _program(influences, limits, searched, grid)
    solve = solver(problem, limits.tolerance, limits.seconds)
    if save_to is not None:
        totals = {str(length): float(influence.double().abs().sum()) for length, influence in influences.items()}
        solve = _recorded(solve, Journal(save_to, {"limits": asdict(limits), "layers": searched, "influence": totals}))
    points = sweep(problem, solve, limits.intervals, progress)
    priced = _program(influences, limits, searched, grid, longer=())
    made = []
    for point in points:
        rows = [[problem.rules[number] for number in choice] for choice in point.choice]
        plan = _written(rows, searched, len(next(iter(influences.values()))), limits)
        verify(plan, problem, searched)
        said = {"minimised": problem.lengths[point.objective], "certified_gap": point.gap, **(evidence or {})}
        made.append(_candidate("searched", plan, priced, point.choice, limits, searched, said))
    return _named(made, model, embeddings)


def rivals(
    influences: Mapping[int, Tensor],
    limits: Limits | None = None,
    *,
    layers: Sequence[int] | None = None,
    model: str | None = None,
    embeddings: str | None = None,
    evidence: Mapping[str, object] | None = None,
) -> list[Candidate]:
    """Plans of simpler kinds with at most the same bytes at every length; arguments as for `search`.

    Returns:
        Two classes of heads, and one span for all of them; a kind for which the bytes do not suffice is left out.
    """
    limits = limits or Limits()
    searched = _searched(influences, layers)
    last = influences[max(influences)]
    kv_heads = last.shape[1]
    shape = ModelShape(len(searched), kv_heads, kv_heads, 1, (None,) * len(searched), None)
    kinds: dict[str, Callable[..., SpanPlan]] = {
        "two classes": partial(two_class, influence=last[searched]),
        "uniform": uniform_window,
    }
    made = []
    for kind, build in kinds.items():
        if (rows := _within(build, shape, limits, influences)) is not None:
            distinct = list(dict.fromkeys(rule for row in rows for rule in row))
            priced = _program(influences, limits, searched, distinct, longer=())
            choice = np.array([[distinct.index(rule) for rule in row] for row in rows])
            plan = _written(rows, searched, len(last), limits)
            made.append(_candidate(kind, plan, priced, choice, limits, searched, evidence or {}))
    return _named(made, model, embeddings)


def _within(
    build: Callable[..., SpanPlan], shape: ModelShape, limits: Limits, influences: Mapping[int, Tensor]
) -> list[list[Rule]] | None:
    """Rules of a kind that keep the density at every length. Whole blocks make shares of other lengths a bit larger."""
    lengths = sorted({*influences, *limits.extend})
    for spare in range(20):
        try:
            density = limits.density * (1 - spare / 100)
            plan = build(shape, density, lengths[0], sink=limits.sink, block=limits.block)
        except ValueError:  # no budget
            return None
        if all(plan.kv_density(length) <= limits.density + 1e-9 for length in lengths):
            return plan.rules()
    return None


def _searched(influences: Mapping[int, Tensor], layers: Sequence[int] | None) -> list[int]:
    """Layers that get spans.

    Raises:
        ValueError: none, or influence that is negative, which no search can tell from noise.
    """
    for length, influence in influences.items():
        if (influence < 0).any():
            raise ValueError(f"influence at length {length} has negative values; take `Influence.mean()`")
    shape = next(iter(influences.values())).shape if influences else (0, 0)
    searched = list(range(shape[0])) if layers is None else list(layers)
    if not searched:
        raise ValueError("no layer to search: every layer of the model has a window of its own")
    return searched


def _program(
    influences: Mapping[int, Tensor],
    limits: Limits,
    searched: Sequence[int],
    grid: Sequence[Rule],
    longer: Sequence[int] | None = None,
) -> Program:
    """``longer``: lengths that the longest profiled one speaks for; None: those that the plan is bounded at."""
    return program(
        {length: influence[list(searched)] for length, influence in influences.items()},
        grid,
        native(limits.sink, limits.block),
        {length: limits.density for length in [*influences, *limits.extend]},
        block=limits.block,
        floor=limits.floor,
        limit=limits.rules_per_layer,
        longer=limits.extend if longer is None else longer,
    )


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
        if found is None and not journal.entries:  # there is no plan at all, nothing to go on with
            return None
        journal.append(
            {"choice": found and found.choice.tolist(), "value": found and found.value, "bound": found and found.bound}
        )
        return found

    return recorded


def _written(rows: Sequence[Sequence[Rule]], searched: Sequence[int], layers: int, limits: Limits) -> SpanPlan:
    """The plan with these rules in the searched layers, and full spans in the others."""
    table = [[FULL] * len(rows[0]) for _ in range(layers)]
    for layer, row in zip(searched, rows, strict=True):
        table[layer] = list(row)
    alphas, betas = ([[rule[part] for rule in row] for row in table] for part in range(2))
    return SpanPlan(alphas, betas, sink=limits.sink, block=limits.block)


def _candidate(
    kind: str,
    plan: SpanPlan,
    priced: Program,
    choice: Choice,
    limits: Limits,
    searched: Sequence[int],
    said: Mapping[str, object],
) -> Candidate:
    """A plan with what it drops, by a program that holds its rules, and what it keeps, as written."""
    losses = dict(zip(priced.lengths, priced.loss(choice).tolist(), strict=True))
    densities = {
        length: float(np.mean([plan.spans(length)[layer] for layer in searched])) / length
        for length in priced.constrained
    }
    plan.searched = {
        "kind": kind,
        "losses": {str(length): loss for length, loss in losses.items()},
        "kv_density": {str(length): density for length, density in densities.items()},
        "layers": list(searched),
        "limits": asdict(limits),
        "versions": versions("torch", "transformers", "scipy"),
        **said,
    }
    return Candidate(plan, kind, losses, densities)


def _named(candidates: list[Candidate], model: str | None, embeddings: str | None) -> list[Candidate]:
    for candidate in candidates:
        candidate.plan.model, candidate.plan.embeddings = model, embeddings
    return candidates


def verify(plan: SpanPlan, problem: Program, searched: Sequence[int]) -> None:
    """Check a plan as it is written against every constraint.

    Raises:
        RuntimeError: it breaks one; names it.
    """
    for length, low, high in zip(problem.constrained, problem.floor, problem.ceiling, strict=True):
        spans = plan.spans(length)
        density = float(np.mean([spans[layer] for layer in searched])) / length
        if not low - 1e-9 <= density <= high + 1e-9:
            raise RuntimeError(f"the written plan keeps {density:.4f} at length {length}, not {low:.4f} to {high:.4f}")
    for layer in searched:
        if (count := len(set(plan.rules()[layer]))) > problem.limit:
            raise RuntimeError(f"the written plan has {count} rules in layer {layer}, more than {problem.limit}")
