"""From a study to its finished cells: what there is to run, how long it takes, and running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from moa.choices import check_choice
from moa.studies import cells as grid
from moa.studies.budget import Fit, fit
from moa.studies.cells import TEST, Cell, Store, configuration, recipe_of
from moa.studies.data import Rows, load
from moa.studies.runner import Job, trial
from moa.studies.study import Study
from moa.studies.workers import Failure, run_all

Result = dict[str, Any]


@dataclass
class Plan:
    """A study that can be run.

    Attributes:
        fits: every method at every budget of its own, with its counted parameters.
        methods: those that are run now; all, unless some were asked for.
    """

    study: Study
    rows: Rows
    fits: dict[tuple[str, int], Fit]
    methods: list[str]

    @property
    def folder(self) -> Path:
        return Path(self.study.output).expanduser()

    @property
    def store(self) -> Store:
        return Store(self.folder / "cells")

    def configuration(self, cell: Cell) -> dict[str, Any]:
        return configuration(self.study, cell, self._recipe(cell), self.rows.digest)

    def job(self, cell: Cell) -> Job:
        sets = self.rows.sets if cell.purpose == TEST else []
        return Job(self._recipe(cell), self.rows.validation, sets, self.study.metrics)

    def finished(self, cells: Sequence[Cell]) -> dict[Cell, Result]:
        """The results of those cells that are on disk."""
        found = {cell: self.store.read(cell, self.configuration(cell)) for cell in cells}
        return {cell: result for cell, result in found.items() if result is not None}

    def rates(self, methods: list[str]) -> dict[tuple[str, int], float] | None:
        """Chosen learning rates by method and budget; None as long as tries are missing."""
        tries = grid.tries(self.study, methods)
        done = self.finished(tries)
        return grid.choose_rates(self.study, methods, done) if len(done) == len(tries) else None

    def _recipe(self, cell: Cell) -> Any:
        train_file = self.rows.write_training_file(self.folder / "rows")
        return recipe_of(
            self.study, cell, self.fits[cell.method, cell.budget], train_file, self.folder / "work" / cell.name
        )


def plan(study: Study, only: Sequence[str] = (), progress: Callable[[str], object] = lambda method: None) -> Plan:
    """Check everything that can be checked before the first cell, and size every method.

    Args:
        study: what to compare.
        only: run these methods alone.
        progress: called with each method's name before it is sized.

    Raises:
        ValueError: an unknown name in ``only``, unusable rows, or methods that miss a budget (all of them are named).
    """
    for name in only:
        check_choice("only", name, list(study.methods))
    rows = load(study.data)
    fits: dict[tuple[str, int], Fit] = {}
    misses: list[str] = []
    for name, method in study.methods.items():
        progress(name)
        for budget in study.budgets_of(name):
            try:
                fits[name, budget] = fit(method, study.base, budget, tolerance=study.tolerance)
            except ValueError as error:
                misses.append(f"{name} at {budget:,}: {error}")
    if misses:
        raise ValueError(
            "not every method meets its budgets. Change budgets or tolerance, change the method (fewer copies, other "
            "kinds in grow), or give it budgets of its own:\n  " + "\n  ".join(misses)
        )
    return Plan(study, rows, fits, list(only) or list(study.methods))


@dataclass
class Progress:
    """Where a run stands: called back after every cell.

    Attributes:
        done, total: cells of this phase, those found on disk included.
        seconds_left: of this phase and what comes after it; None as long as nothing was measured.
        last: the cell just finished, None at the start of a phase.
    """

    phase: str
    done: int
    total: int
    seconds_left: float | None
    last: Cell | None


def conduct(plan: Plan, *, workers: int, progress: Callable[[Progress], object]) -> list[Failure]:
    """Run all cells that are missing: the tries of learning rates first, then what is compared.

    Returns:
        The cells that failed; they are run again next time, like all that are missing.

    Raises:
        ValueError: a method diverged at every learning rate.
    """
    tries = grid.tries(plan.study, plan.methods)
    placeholder = {key: plan.study.tuning.learning_rates[0] for key in plan.fits}
    later = grid.tests(plan.study, plan.methods, placeholder)
    failures = _run(plan, "learning rates", tries, later, workers, progress)
    if failures:
        return failures
    rates = plan.rates(plan.methods)
    assert rates is not None
    return _run(plan, "comparison", grid.tests(plan.study, plan.methods, rates), [], workers, progress)


def _run(
    plan: Plan,
    phase: str,
    cells: list[Cell],
    later: list[Cell],
    workers: int,
    progress: Callable[[Progress], object],
) -> list[Failure]:
    done = plan.finished(cells)
    missing = {cell.name: cell for cell in cells if cell not in done}
    failures: list[Failure] = []

    def report(last: Cell | None) -> None:
        left = [cell for cell in missing.values() if cell not in done]
        progress(Progress(phase, len(done), len(cells), seconds_for([*left, *later], done, workers), last))

    report(None)
    jobs = {name: plan.job(cell) for name, cell in missing.items()}
    for name, outcome in run_all(jobs, plan.folder / "logs", workers):
        cell = missing[name]
        if isinstance(outcome, Failure):
            failures.append(outcome)
            del missing[name]
        else:
            outcome["trained_parameters"] = plan.fits[cell.method, cell.budget].trained
            plan.store.write(cell, plan.configuration(cell), outcome)
            done[cell] = outcome
        report(cell)
    return failures


def seconds_for(cells: Sequence[Cell], known: dict[Cell, Result], workers: int) -> float | None:
    """How long ``cells`` take, from those that are known: of the same method where there are some, else of all."""
    if not cells:
        return 0.0
    if not known:
        return None
    times = {cell: sum(result["seconds"].values()) for cell, result in known.items()}
    everywhere = fmean(times.values())

    def of(cell: Cell) -> float:
        alike = [t for other, t in times.items() if other.method == cell.method and other.purpose == cell.purpose]
        return fmean(alike) if alike else everywhere

    return sum(map(of, cells)) / min(workers, len(cells))


def trial_seconds(plan: Plan, method: str) -> tuple[float, float]:
    """Seconds of one try and of one compared cell of ``method``, extrapolated from a few steps and rows.

    Raises:
        ValueError: the trial failed; names its log.
    """
    study = plan.study
    cell = Cell(TEST, method, plan.study.budgets_of(method)[0], study.seeds[0], study.tuning.learning_rates[0])
    whole = plan.job(cell)
    short = trial(whole)
    ((_, outcome),) = run_all({f"{cell.name}-trial": short}, plan.folder / "logs", 1)
    if isinstance(outcome, Failure):
        raise ValueError(f"a trial of {method} failed: {outcome.message}; see {outcome.log}")
    share = sum(len(data.rows) for data in whole.sets) / sum(len(data.rows) for data in short.sets)
    steps_left = study.steps - int(short.recipe.max_steps or 0)
    train = outcome["seconds"]["train"] + outcome["step_seconds"] * steps_left
    # Validation rows cost one forward each, a small part of what answering a test row takes.
    return train + outcome["seconds"]["evaluate"], train + outcome["seconds"]["evaluate"] * share
