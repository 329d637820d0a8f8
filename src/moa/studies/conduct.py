"""Running a study's cells: the tries of learning rates, then what is compared; and how long it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

from moa.studies import cells as grid
from moa.studies.cells import TEST, Cell
from moa.studies.engine import Engine, Failure, Task, run_all
from moa.studies.plan import Plan, Result, check_versions
from moa.studies.runner import Job, keep, run, trial


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
    run_phase = partial(_run, plan, engine, progress, any_version)
    later = grid.tests(plan.study, plan.methods, plan.first_rates)
    failures = run_phase("learning rates", grid.tries(plan.study, plan.methods), later)
    if failures:
        return failures
    rates = plan.rates(plan.methods)
    assert rates is not None
    return run_phase("comparison", grid.tests(plan.study, plan.methods, rates), [])


def _run(
    plan: Plan,
    engine: Engine,
    progress: Callable[[Progress], object],
    any_version: bool,
    phase: str,
    cells: list[Cell],
    later: list[Cell],
) -> list[Failure]:
    done = plan.finished(cells)
    if not any_version:
        check_versions(done)

    def report(last: Cell | None) -> None:
        left = [cell for cell in cells if cell not in done]
        progress(Progress(phase, len(done), len(cells), seconds_for([*left, *later], done, engine.workers or 1), last))

    def look() -> None:
        for cell, result in plan.finished([cell for cell in cells if cell not in done]).items():
            done[cell] = result
            report(cell)

    report(None)
    outcomes = run_all([_task(plan, cell) for cell in cells if cell not in done], engine, look)
    return [outcome for outcome in outcomes if isinstance(outcome, Failure)]


def job(plan: Plan, cell: Cell) -> Job:
    """What a worker does for a cell."""
    return Job(plan.study, cell, plan.recipes(cell), replace(plan.rows, stages=[]), plan.folder)


def _task(plan: Plan, cell: Cell) -> Task:
    trained = plan.fits[cell.method, cell.budget].trained
    about = {"configuration": plan.configuration(cell), "trained_parameters": trained}
    return Task(partial(keep, job(plan, cell), about, plan.path(cell)), plan.folder / "logs" / f"{cell.name}.log")


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
    cell = Cell(TEST, method, study.budgets_of(method)[0], study.seeds[0], study.rates_of(method)[0])
    whole = job(plan, cell)
    short = trial(whole)
    log = plan.folder / "logs" / f"{cell.name}-trial.log"
    (outcome,) = run_all([Task(partial(run, short), log)], Engine(), lambda: None)
    if isinstance(outcome, Failure):
        raise ValueError(f"a trial of {method} failed: {outcome.message}; see {outcome.log}")
    share = sum(len(data.rows) for data in whole.rows.sets) / max(sum(len(data.rows) for data in short.rows.sets), 1)
    steps_left = sum(int(recipe.max_steps or 0) for recipe in whole.recipes)
    steps_left -= sum(int(recipe.max_steps or 0) for recipe in short.recipes)
    train = outcome["seconds"]["train"] + (outcome["step_seconds"] or 0.0) * steps_left
    # Validation rows cost one forward each, a small part of what answering a test row takes.
    return train + outcome["seconds"]["evaluate"], train + outcome["seconds"]["evaluate"] * share
