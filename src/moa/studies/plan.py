"""What a study is going to run: its rows, the sizes of its methods, and what is finished already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa.choices import check_choice
from moa.evaluation.likelihood import KINDS
from moa.spans import SpanPlan
from moa.studies import cells as grid
from moa.studies.budget import Fit, fit
from moa.studies.cells import Cell, Store, configuration, recipes_of
from moa.studies.data import Rows, load
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
        return configuration(self.study, cell, self.recipes(cell), self.rows.digest)

    def finished(self, cells: Sequence[Cell]) -> dict[Cell, Result]:
        """The results of those cells that are on disk."""
        found = {cell: self.store.read(cell, self.configuration(cell)) for cell in cells}
        return {cell: result for cell, result in found.items() if result is not None}

    def rates(self, methods: list[str]) -> dict[tuple[str, float], float] | None:
        """Chosen learning rates by method and budget; None as long as tries are missing."""
        tries = grid.tries(self.study, methods)
        done = self.finished(tries)
        return grid.choose_rates(self.study, methods, done) if len(done) == len(tries) else None

    def recipes(self, cell: Cell) -> list[Recipe]:
        files = self.rows.training_files(self.folder / "rows")
        adapter, work = self.fits[cell.method, cell.budget].section, self.folder / "work" / cell.name
        return recipes_of(self.study, cell, adapter, files, work)


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
