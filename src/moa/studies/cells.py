"""Cells: one training run each. Which there are, and which learning rate those that were tried choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moa.studies.study import Study

TRY, TEST = "try", "test"
Rates = dict[tuple[str, float], float]
"""Learning rates by method and budget."""


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
        for budget in dict.fromkeys(study.tried_budget(method, budget) for budget in study.budgets_of(method))
        for rate in study.rates_of(method)
        for seed in study.tuning.seeds
    ]


def tests(study: Study, methods: list[str], rates: Rates) -> list[Cell]:
    """The cells that are compared, with the chosen learning rates; seed by seed."""
    return [
        Cell(TEST, method, budget, seed, rates[method, budget])
        for seed in study.seeds
        for method in methods
        for budget in study.budgets_of(method)
    ]


def choose_rates(study: Study, methods: list[str], results: dict[Cell, dict[str, Any]]) -> Rates:
    """The learning rate of lowest validation loss, mean over tuning seeds, for every method and budget.

    Raises:
        ValueError: every rate of a method diverged.
    """
    return {
        (method, budget): _chosen(study, method, budget, results)
        for method in methods
        for budget in study.budgets_of(method)
    }


def _chosen(study: Study, method: str, budget: float, results: dict[Cell, dict[str, Any]]) -> float:
    rates, tried = study.rates_of(method), study.tried_budget(method, budget)
    if not study.chooses(method):
        return rates[0] if study.methods[method].trains else 0.0
    losses = {
        rate: [results[Cell(TRY, method, tried, seed, rate)]["validation_loss"] for seed in study.tuning.seeds]
        for rate in rates
    }
    sound = {rate: sum(values) for rate, values in losses.items() if None not in values}
    if not sound:
        raise ValueError(f"{method} at {tried:,} parameters diverged at every rate of {rates}: try lower ones")
    return min(sound, key=lambda rate: sound[rate])
