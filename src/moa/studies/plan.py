"""What a study is going to run: its rows, the sizes of its methods, what every cell depends on, and what is finished.

A cell has one JSON file, there whole or not at all, which holds the configuration it was made with. A study that goes
on takes it for done only if that is the one it wants now; otherwise, or if the file is damaged, the cell runs again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moa.choices import check_choice
from moa.evaluation.results import PACKAGES
from moa.files import read_json
from moa.studies import cells as grid
from moa.studies.budget import Fit, fit
from moa.studies.cells import TEST, Cell, Rates
from moa.studies.data import Rows, about, has, load
from moa.studies.methods import CALIBRATED
from moa.studies.study import Study
from moa.training.recipe import Recipe
from moa.training.spans import plan_from
from moa.versions import versions

FORMAT = 1
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

    def path(self, cell: Cell) -> Path:
        """Of the cell's file."""
        return self.folder / "cells" / f"{cell.name}.json"

    def finished(self, cells: Sequence[Cell]) -> dict[Cell, Result]:
        """The results of those cells that are on disk, made with the configuration they should have."""
        found: dict[Cell, Result] = {}
        for cell in cells:
            try:
                result = read_json(self.path(cell))
            except (OSError, ValueError):
                continue
            if isinstance(result, dict) and result.get("configuration") == self.configuration(cell):
                found[cell] = result
        return found

    def rates(self, methods: list[str]) -> Rates | None:
        """Chosen learning rates; None as long as tries are missing."""
        tries = grid.tries(self.study, methods)
        done = self.finished(tries)
        return grid.choose_rates(self.study, methods, done) if len(done) == len(tries) else None

    @property
    def first_rates(self) -> Rates:
        """To know what will be compared while tries are missing."""
        return {key: self.study.rates_of(key[0])[0] for key in self.fits}

    def recipes(self, cell: Cell) -> list[Recipe]:
        """What the cell trains, stage by stage."""
        study, method = self.study, self.study.methods[cell.method]
        if not method.trains:
            return []
        usual = {
            "save_steps": -(-study.steps // study.snapshots) if cell.purpose == TEST else study.steps,
            "keep_checkpoints": study.snapshots + 1,
            "log_steps": max(1, study.steps // 20),
        }
        data = {"template": study.data.template, "max_length": study.data.max_length}
        decided = {
            "base": study.base,
            "adapter": self.fits[cell.method, cell.budget].section,
            "seed": cell.seed,
            "max_steps": study.steps,
            "batch_size": study.batch_size,
            "learning_rate": cell.learning_rate,
        }
        given: dict[str, Any] = usual | study.training | method.training | decided
        work = self.folder / "work" / cell.name
        return [
            Recipe(data=data | {"train": [str(file)]}, output=str(work / f"stage-{stage}"), **given)  # type: ignore[arg-type]
            for stage, file in enumerate(self.rows.training_files(self.folder / "rows"), start=1)
        ]

    def configuration(self, cell: Cell) -> dict[str, Any]:
        """Everything that a cell's result depends on but versions, as it comes back from JSON."""
        study, method = self.study, self.study.methods[cell.method]
        trained = [asdict(recipe) for recipe in self.recipes(cell)]
        for recipe in trained:
            del recipe["output"], recipe["report_to"], recipe["data"]["train"]
            recipe["spans"] = _content(recipe["spans"])
        plain: dict[str, Any] = {"format": FORMAT, "cell": asdict(cell), "rows": self.rows.digest}
        plain |= {"recipe": trained[0]} if trained else {"base": study.base, "dtype": study.dtype}
        if len(trained) > 1:
            plain["stages"] = len(trained)
        if cell.purpose == TEST:
            plain |= {"metrics": study.metrics, "snapshots": study.snapshots}
        if method.spans in CALIBRATED:
            plain["spans"] = [method.spans, asdict(study.calibration)]
        elif method.spans:
            plain["spans"] = _content(method.spans)
        return json.loads(json.dumps(plain))  # type: ignore[no-any-return]


def _content(plan: str | None) -> str | None:
    """What counts of a plan's file: not where it is."""
    path = Path(plan or "").expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if plan and path.is_file() else plan


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
                plan_from(file)
    rows = load(study.data, study.base, trains=any(method.trains for method in study.methods.values()))
    if idle := [metric for metric in study.metrics if not any(has(about(data), metric) for data in rows.tested)]:
        raise ValueError(f"metrics names {idle}, but no set of data.test={study.data.test} can be measured so")
    fits: dict[tuple[str, float], Fit] = {}
    misses: list[str] = []
    for name, method in study.methods.items():
        progress(name)
        for budget in study.budgets_of(name):
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


def versions_of(results: Iterable[Result]) -> dict[str, list[str]]:
    """The versions that cells were made with: of every package one, or all where they differ."""
    seen: dict[str, list[str]] = {}
    for result in results:
        for name, number in result.get("versions", {}).items():
            seen[name] = list(dict.fromkeys([*seen.get(name, []), number]))
    return seen


def check_versions(done: Mapping[Cell, Result]) -> None:
    """Refuse finished cells that were made with other versions than those that go on.

    Raises:
        ValueError: naming the packages, how many cells there are, and what to do.
    """
    now = versions(*PACKAGES)
    odd = [
        cell
        for cell, result in done.items()
        if any(now.get(name, number) != number for name, number in result.get("versions", {}).items())
    ]
    if odd:
        said = ", ".join(
            f"{name} {'/'.join(others)} (now {now[name]})"
            for name, numbers in versions_of(done.values()).items()
            if (others := [number for number in numbers if number != now.get(name, number)])
        )
        raise ValueError(
            f"{len(odd)} of {len(done)} finished cells were made with other versions: {said}. Install those, or choose "
            f"another --output to start over, or go on with --any-version (the page will name both); one of them is "
            f"{odd[0].name}"
        )
