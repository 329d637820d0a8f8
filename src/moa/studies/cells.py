"""Cells: one training run each, one JSON file each, there whole or not at all.

A cell's file holds the configuration it was made with. A study that goes on takes a file for done only if that
configuration is the one it wants now; otherwise, or if the file is damaged, the cell is run again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moa.evaluation.results import write
from moa.studies.budget import Fit
from moa.studies.study import Study
from moa.training.recipe import Recipe

FORMAT = 1
TRY, TEST = "try", "test"


@dataclass(frozen=True)
class Cell:
    """One training run of a study.

    Attributes:
        purpose: ``"try"`` measures a learning rate on validation rows, ``"test"`` what is compared.
        method: name in the study.
        budget: trained parameters asked for.
        seed: of initial weights and data order.
        learning_rate: peak.
    """

    purpose: str
    method: str
    budget: int
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        """Unique in the study; a file name."""
        rate = f"-lr{self.learning_rate:g}" if self.purpose == TRY else ""
        return f"{self.purpose}-{self.method.replace(':', '+')}-{self.budget}-s{self.seed}{rate}"


def tries(study: Study, methods: list[str]) -> list[Cell]:
    """The cells that choose learning rates; none if there is nothing to choose from."""
    rates = study.tuning.learning_rates
    if len(rates) < 2:
        return []
    return [
        Cell(TRY, method, budget, seed, rate)
        for method in methods
        for budget in _tried_budgets(study, method)
        for rate in rates
        for seed in study.tuning.seeds
    ]


def tests(study: Study, methods: list[str], rates: dict[tuple[str, int], float]) -> list[Cell]:
    """The cells that are compared, with the chosen learning rates by method and budget; seed by seed."""
    return [
        Cell(TEST, method, budget, seed, rates[method, budget])
        for seed in study.seeds
        for method in methods
        for budget in study.budgets_of(method)
    ]


def choose_rates(study: Study, methods: list[str], results: dict[Cell, dict[str, Any]]) -> dict[tuple[str, int], float]:
    """The learning rate of lowest validation loss, mean over tuning seeds, for every method and budget.

    Raises:
        ValueError: every rate of a method diverged.
    """
    rates = study.tuning.learning_rates
    chosen: dict[tuple[str, int], float] = {}
    for method in methods:
        for budget in study.budgets_of(method):
            if len(rates) < 2:
                chosen[method, budget] = rates[0]
                continue
            tried = tried_budget(study, method, budget)
            losses = {
                rate: [results[Cell(TRY, method, tried, seed, rate)]["validation_loss"] for seed in study.tuning.seeds]
                for rate in rates
            }
            sound = {rate: sum(values) for rate, values in losses.items() if None not in values}
            if not sound:
                raise ValueError(f"{method} at {tried:,} parameters diverged at every rate of {rates}: try lower ones")
            chosen[method, budget] = min(sound, key=lambda rate: sound[rate])
    return chosen


def tried_budget(study: Study, method: str, budget: int) -> int:
    """Where the learning rate for ``budget`` is tried."""
    own = study.budgets_of(method)
    return study.tuning.budget if study.tuning.budget in own and study.tuning.budget is not None else budget


def _tried_budgets(study: Study, method: str) -> list[int]:
    return list(dict.fromkeys(tried_budget(study, method, budget) for budget in study.budgets_of(method)))


def recipe_of(study: Study, cell: Cell, fitted: Fit, train_file: Path, output: Path) -> Recipe:
    """What the cell trains."""
    data = {"train": [str(train_file)], "template": study.data.template, "max_length": study.data.max_length}
    own = {
        "save_steps": -(-study.steps // study.snapshots) if cell.purpose == TEST else study.steps,
        "keep_checkpoints": study.snapshots + 1,
        "log_steps": max(1, study.steps // 20),
    }
    decided = {"max_steps": study.steps, "batch_size": study.batch_size, "learning_rate": cell.learning_rate}
    return Recipe(
        base=study.base,
        adapter=fitted.section,
        data=data,  # type: ignore[arg-type]
        output=str(output),
        seed=cell.seed,
        **(own | study.training | decided),
    )


def configuration(study: Study, cell: Cell, recipe: Recipe, digest: str) -> dict[str, Any]:
    """Everything that a cell's result depends on, as it comes back from JSON."""
    trained = asdict(recipe)
    for machine in ("output", "report_to"):
        trained.pop(machine)
    trained["data"].pop("train")
    measured = {"metrics": study.metrics, "snapshots": study.snapshots} if cell.purpose == TEST else {}
    plain = {"format": FORMAT, "cell": asdict(cell), "recipe": trained, "rows": digest, **measured}
    return json.loads(json.dumps(plain))  # type: ignore[no-any-return]


class Store:
    """The folder of finished cells."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"

    def read(self, cell: Cell, configuration: dict[str, Any]) -> dict[str, Any] | None:
        """The cell's result if it was made with ``configuration``; None if it has to be run."""
        try:
            found = json.loads(self.path(cell).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("configuration") != configuration:
            return None
        return found

    def write(self, cell: Cell, configuration: dict[str, Any], result: dict[str, Any]) -> None:
        write(self.path(cell), {"configuration": configuration} | result)
