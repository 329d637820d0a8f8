"""Cells: one training run each, one JSON file each, there whole or not at all.

A cell's file holds the configuration it was made with. A study that goes on takes a file for done only if that
configuration is the one it wants now; otherwise, or if the file is damaged, the cell is run again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moa.evaluation.results import PACKAGES
from moa.files import read_json
from moa.studies.methods import CALIBRATED
from moa.studies.study import Study
from moa.training.recipe import Recipe
from moa.versions import versions

FORMAT = 1
TRY, TEST = "try", "test"


@dataclass(frozen=True)
class Cell:
    """One training run of a study.

    Attributes:
        purpose: ``"try"`` measures a learning rate on validation rows, ``"test"`` what is compared.
        method: name in the study.
        budget: trained parameters asked for, or share of the KV cache.
        seed: of initial weights, data order and calibration texts.
        learning_rate: peak; 0 for what is not trained.
    """

    purpose: str
    method: str
    budget: float
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        """Unique in the study; a file name."""
        rate = f"-lr{self.learning_rate:g}" if self.purpose == TRY else ""
        return f"{self.purpose}-{self.method.replace(':', '+')}-{self.budget}-s{self.seed}{rate}"


def tries(study: Study, methods: list[str]) -> list[Cell]:
    """The cells that choose learning rates; none if there is nothing to choose from."""
    return [
        Cell(TRY, method, budget, seed, rate)
        for method in methods
        if study.chooses(method)
        for budget in _tried_budgets(study, method)
        for rate in study.rates_of(method)
        for seed in study.tuning.seeds
    ]


def tests(study: Study, methods: list[str], rates: dict[tuple[str, float], float]) -> list[Cell]:
    """The cells that are compared, with the chosen learning rates by method and budget; seed by seed."""
    return [
        Cell(TEST, method, budget, seed, rates[method, budget])
        for seed in study.seeds
        for method in methods
        for budget in study.budgets_of(method)
    ]


def choose_rates(
    study: Study, methods: list[str], results: dict[Cell, dict[str, Any]]
) -> dict[tuple[str, float], float]:
    """The learning rate of lowest validation loss, mean over tuning seeds, for every method and budget.

    Raises:
        ValueError: every rate of a method diverged.
    """
    chosen: dict[tuple[str, float], float] = {}
    for method in methods:
        rates = study.rates_of(method)
        for budget in study.budgets_of(method):
            if not study.chooses(method):
                chosen[method, budget] = rates[0] if study.methods[method].trains else 0.0
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


def tried_budget(study: Study, method: str, budget: float) -> float:
    """Where the learning rate for ``budget`` is tried."""
    own = study.budgets_of(method)
    return study.tuning.budget if study.tuning.budget in own and study.tuning.budget is not None else budget


def _tried_budgets(study: Study, method: str) -> list[float]:
    return list(dict.fromkeys(tried_budget(study, method, budget) for budget in study.budgets_of(method)))


def recipes_of(
    study: Study, cell: Cell, adapter: dict[str, Any], train_files: Sequence[Path], output: Path
) -> list[Recipe]:
    """What the cell trains, stage by stage; ``adapter`` is the recipes' section."""
    method = study.methods[cell.method]
    own = {
        "save_steps": -(-study.steps // study.snapshots) if cell.purpose == TEST else study.steps,
        "keep_checkpoints": study.snapshots + 1,
        "log_steps": max(1, study.steps // 20),
    }
    decided = {"max_steps": study.steps, "batch_size": study.batch_size, "learning_rate": cell.learning_rate}
    found = []
    for stage, file in enumerate(train_files if method.trains else []):
        data = {"train": [str(file)], "template": study.data.template, "max_length": study.data.max_length}
        found.append(
            Recipe(
                base=study.base,
                adapter=adapter,
                data=data,  # type: ignore[arg-type]
                output=str(output / f"stage-{stage + 1}"),
                seed=cell.seed,
                **(own | study.training | method.training | decided),
            )
        )
    return found


def configuration(study: Study, cell: Cell, recipes: Sequence[Recipe], digest: str) -> dict[str, Any]:
    """Everything that a cell's result depends on, as it comes back from JSON. Versions are apart, see `Store`."""
    method = study.methods[cell.method]
    trained = [asdict(recipe) for recipe in recipes]
    for recipe in trained:
        for machine in ("output", "report_to"):
            recipe.pop(machine)
        recipe["data"].pop("train")
        recipe["spans"] = _content(recipe["spans"])
    plain: dict[str, Any] = {"format": FORMAT, "cell": asdict(cell), "rows": digest}
    plain |= {"recipe": trained[0], "stages": len(trained)} if trained else {"base": study.base, "dtype": study.dtype}
    if cell.purpose == TEST:
        plain |= {"metrics": study.metrics, "snapshots": study.snapshots}
    if method.spans:
        plain["spans"] = (
            [method.spans, asdict(study.calibration)] if method.spans in CALIBRATED else _content(method.spans)
        )
    if plain.get("stages") == 1:
        del plain["stages"]
    return json.loads(json.dumps(plain))  # type: ignore[no-any-return]


def _content(plan: str | None) -> str | None:
    """What counts of a plan's file: not where it is."""
    path = Path(plan or "").expanduser()
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if plan and path.is_file() else plan


class Store:
    """The folder of finished cells."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"

    def read(self, cell: Cell, configuration: dict[str, Any]) -> dict[str, Any] | None:
        """The cell's result if it was made with ``configuration``; None if it has to be run."""
        try:
            found = read_json(self.path(cell))
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("configuration") != configuration:
            return None
        return found


def check_versions(done: Mapping[Cell, dict[str, Any]]) -> None:
    """Refuse finished cells that were made with other versions than those that go on.

    Raises:
        ValueError: naming the packages, how many cells there are, and what to do.
    """
    now = versions(*PACKAGES)
    others = {
        cell: {n: v for n, v in found.get("versions", {}).items() if now.get(n, v) != v} for cell, found in done.items()
    }
    odd = {cell: differing for cell, differing in others.items() if differing}
    if odd:
        names = sorted({name for differing in odd.values() for name in differing})
        said = ", ".join(
            f"{n} {'/'.join(sorted({d[n] for d in odd.values() if n in d}))} (now {now[n]})" for n in names
        )
        raise ValueError(
            f"{len(odd)} of {len(done)} finished cells were made with other versions: {said}. Install those, or choose "
            f"another --output to start over, or go on with --any-version (the page will name both); one of them is "
            f"{next(iter(odd)).name}"
        )
