"""From a study to its finished cells: what there is to run, how long it takes, and running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from moa.adapters.choices import check_choice
from moa.evaluation.likelihood import KINDS
from moa.spans import SpanPlan
from moa.studies import cells as grid
from moa.studies.budget import Fit, fit
from moa.studies.cells import TEST, Cell, Store, check_versions, configuration, recipes_of
from moa.studies.data import Rows, load
from moa.studies.engine import Engine, Failure, Task, run_all
from moa.studies.plans import Spans
from moa.studies.runner import Job, trial
from moa.studies.study import Study
from moa.training.recipe import Recipe

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
    fits: dict[tuple[str, float], Fit]
    methods: list[str]

    @property
    def folder(self) -> Path:
        return Path(self.study.output).expanduser()

    @property
    def store(self) -> Store:
        return Store(self.folder / "cells")

    def configuration(self, cell: Cell) -> dict[str, Any]:
        return configuration(self.study, cell, self._recipes(cell), self.rows.digest)

    def job(self, cell: Cell) -> Job:
        study, compared = self.study, cell.purpose == TEST
        spans = study.methods[cell.method].spans
        folder = self.folder / "spans" / f"seed-{cell.seed}"
        return Job(
            study.base,
            study.dtype,
            self._recipes(cell),
            Spans(spans if compared else "", cell.budget, study.calibration, folder, cell.seed),
            study.data.template,
            study.batch_size,
            self.rows.validation,
            self.rows.sets if compared else [],
            self.rows.texts if compared else [],
            study.metrics,
        )

    def task(self, cell: Cell) -> Task:
        """The cell as an engine takes it."""
        fitted = self.fits[cell.method, cell.budget]
        about = {"configuration": self.configuration(cell), "trained_parameters": fitted.trained}
        return Task(self.job(cell), self.folder / "logs" / f"{cell.name}.log", self.store.path(cell), about)

    def finished(self, cells: Sequence[Cell]) -> dict[Cell, Result]:
        """The results of those cells that are on disk."""
        found = {cell: self.store.read(cell, self.configuration(cell)) for cell in cells}
        return {cell: result for cell, result in found.items() if result is not None}

    def rates(self, methods: list[str]) -> dict[tuple[str, float], float] | None:
        """Chosen learning rates by method and budget; None as long as tries are missing."""
        tries = grid.tries(self.study, methods)
        done = self.finished(tries)
        return grid.choose_rates(self.study, methods, done) if len(done) == len(tries) else None

    def _recipes(self, cell: Cell) -> list[Recipe]:
        files = self.rows.training_files(self.folder / "rows")
        fitted, work = self.fits[cell.method, cell.budget], self.folder / "work" / cell.name
        return recipes_of(self.study, cell, fitted, files, work)


def plan(study: Study, only: Sequence[str] = (), progress: Callable[[str], object] = lambda method: None) -> Plan:
    """Check everything that can be checked before the first cell, and size every method.

    Args:
        study: what to compare.
        only: run these methods alone.
        progress: called with each method's name before it is sized.

    Raises:
        ValueError: an unknown name in ``only``, unusable rows, or methods that miss a budget (all of them are named).
        FileNotFoundError: no such rows, text or span plan.
    """
    for name in only:
        check_choice("only", name, list(study.methods))
    for method in study.methods.values():
        for file in (method.spans, method.training.get("spans"), study.training.get("spans")):
            if file and file.endswith(".json"):
                SpanPlan.load(Path(file).expanduser())
    rows = load(study.data, study.base, trains=any(method.trains for method in study.methods.values()))
    few = [data for data in rows.sets if data.kind in KINDS]
    measured = {"accuracy": rows.sets, "choice": few, "answer_loss": rows.sets, "text_loss": rows.texts}
    if idle := [metric for metric in study.metrics if not measured[metric]]:
        raise ValueError(f"metrics names {idle}, but no set of data.test={study.data.test} can be measured so")
    fits: dict[tuple[str, float], Fit] = {}
    misses: list[str] = []
    for name, method in study.methods.items():
        progress(name)
        for budget in study.budgets_of(name):
            if not method.trains:
                fits[name, budget] = Fit({}, 0, {})
                continue
            try:
                fits[name, budget] = fit(method, study.base, int(budget), tolerance=study.tolerance)
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


def conduct(
    plan: Plan, *, engine: Engine, progress: Callable[[Progress], object], any_version: bool = False
) -> list[Failure]:
    """Run all cells that are missing: the tries of learning rates first, then what is compared.

    Args:
        plan: what to run.
        engine: where.
        progress: called after every cell.
        any_version: go on from cells that were made with other versions.

    Returns:
        The cells that failed; they are run again next time, like all that are missing.

    Raises:
        ValueError: a method diverged at every learning rate, or finished cells are of other versions.
    """
    tries = grid.tries(plan.study, plan.methods)
    placeholder = {key: plan.study.tuning.learning_rates[0] for key in plan.fits}
    later = grid.tests(plan.study, plan.methods, placeholder)
    if not any_version:
        check_versions(plan.finished(tries))
    failures = _run(plan, "learning rates", tries, later, engine, progress)
    if failures:
        return failures
    rates = plan.rates(plan.methods)
    assert rates is not None
    tests = grid.tests(plan.study, plan.methods, rates)
    if not any_version:
        check_versions(plan.finished(tests))
    return _run(plan, "comparison", tests, [], engine, progress)


def _run(
    plan: Plan,
    phase: str,
    cells: list[Cell],
    later: list[Cell],
    engine: Engine,
    progress: Callable[[Progress], object],
) -> list[Failure]:
    done = plan.finished(cells)
    tasks = {cell: plan.task(cell) for cell in cells if cell not in done}

    def report(last: Cell | None) -> None:
        left = [cell for cell in cells if cell not in done]
        progress(Progress(phase, len(done), len(cells), seconds_for([*left, *later], done, engine.workers or 1), last))

    def look() -> None:
        for cell, task in tasks.items():
            if cell not in done and (found := plan.store.read(cell, dict(task.about["configuration"]))):
                done[cell] = found
                report(cell)

    report(None)
    outcomes = run_all(list(tasks.values()), engine, look)
    return [outcome for outcome in outcomes if isinstance(outcome, Failure)]


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
    log = plan.folder / "logs" / f"{cell.name}-trial.log"
    (outcome,) = run_all([Task(short, log, None, {})], Engine(), lambda: None)
    if isinstance(outcome, Failure):
        raise ValueError(f"a trial of {method} failed: {outcome.message}; see {outcome.log}")
    share = sum(len(data.rows) for data in whole.sets) / max(sum(len(data.rows) for data in short.sets), 1)
    steps_left = sum(int(recipe.max_steps or 0) for recipe in whole.recipes)
    steps_left -= sum(int(recipe.max_steps or 0) for recipe in short.recipes)
    train = outcome["seconds"]["train"] + (outcome["step_seconds"] or 0.0) * steps_left
    # Validation rows cost one forward each, a small part of what answering a test row takes.
    return train + outcome["seconds"]["evaluate"], train + outcome["seconds"]["evaluate"] * share
