"""`Study`: everything a comparison depends on, read from one YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import field_validator

from moa.choices import check_choice, check_names, named
from moa.data.templates import TemplateName
from moa.recipes import find
from moa.settings import Several, knob, load, settings
from moa.studies.methods import Budgets, Method, check_budgets
from moa.studies.metrics import METRICS
from moa.training.recipe import Recipe

DECIDED = ("base", "adapter", "data", "output", "epochs", "max_steps", "batch_size", "learning_rate", "seed")
"""Keys of a recipe that a study sets by itself, the same for every method."""


@settings
class StudyData:
    """What is learned and what is asked. Rows are drawn once, the same for every cell."""

    train: Several[str] = knob(lambda: ["tasks:all"], "sources to learn from, as in a recipe")
    then: list[Several[str]] = knob(
        list, "sources of later stages: each is learned on top of what the stage before left"
    )
    train_rows: int | None = knob(None, "at most this many rows of each source", ge=1)
    validation_rows: int = knob(440, "rows held out from training, for choosing learning rates only", ge=1)
    test: Several[str] = knob(
        lambda: ["tasks:all"],
        "sources to evaluate on, as in `moa eval`; also long:TASK@TOKENS (lines, needle, copying, facts) and running "
        "text, text:NAME@TOKENS (manual, novels, a file)",
    )
    test_rows: int | None = knob(100, "at most this many rows or windows of each test set", ge=2)
    template: TemplateName = knob("short", "prompt template")
    max_length: int = knob(128, "tokens of prompt and answer together in training", ge=8)
    max_new_tokens: int | None = knob(None, "longest answer; by the kind of the answers if empty", ge=1)
    seed: int = knob(0, "of the draw of rows", ge=0, le=2**32 - 1)


@settings
class Calibration:
    """What span plans are made from; every seed of the study draws its own texts."""

    source: str = knob("tasks:lines,needle,copying", "texts with questions, as data.source of a span recipe")
    lengths: Several[int] = knob(lambda: [512, 1024], "profiled lengths, tokens")
    extend: Several[int] = knob(list, "lengths bounded but not profiled, tokens")
    validate_length: int = knob(2048, "longer length at which the search's plans are compared", ge=1)
    items: int = knob(24, "calibration items per profiled length", ge=1)
    validate_items: int = knob(12, "items of the longer length", ge=1)
    max_new_tokens: int = knob(32, "longest answer of the dense model", ge=1)
    step: int = knob(128, "tokens between offsets of the search grid", ge=1)


@settings
class Tuning:
    """Every method gets its learning rate by equally many tries; the lowest answer loss on validation rows wins."""

    learning_rates: Several[float] = knob(lambda: [3e-3, 1e-2, 3e-2], "rates to try; one alone is taken without a try")
    seeds: Several[int] = knob(lambda: [1000], "seeds of the tries, none of those that are compared")
    budget: int | None = knob(None, "try at this budget alone and use the result at all; each budget if empty")


@settings
class Claim:
    """``better`` is better than every one of ``than`` at every budget: written down before the study runs.

    Attributes:
        better: the reference method; its name in ``methods``.
        than: names of its rivals.
        text: the claim in words, for the page.
        budgets: where it is to hold; at all budgets of the study if empty.
        metric: what decides it; the study's first metric if empty.
    """

    better: str = ""
    than: Several[str] = dataclasses.field(default_factory=list)
    text: str = ""
    budgets: Budgets = dataclasses.field(default_factory=list)
    metric: str = ""

    def __post_init__(self) -> None:
        self.text = self.text or f"{self.better} is better than {', '.join(map(str, self.than))}."

    def check(self, study: Study) -> None:
        """Raise ValueError unless the claim is about methods, budgets and metrics of the study."""
        check_choice("claims: better", self.better, study.methods)
        check_names("claims: than", self.than, list(study.methods))
        if self.better in self.than:
            raise ValueError(f"claims: {self.better!r} cannot be better than itself")
        check_budgets("claims", self.budgets, study.budgets)
        if self.metric:
            check_choice("claims: metric", self.metric, study.metrics)
        for name in (self.better, *self.than):
            if absent := set(self.budgets or study.budgets) - set(study.budgets_of(name)):
                raise ValueError(
                    f"the claim {self.text!r} needs {name!r} at {sorted(absent)}, where it takes no part: "
                    f"give the claim or the method other budgets"
                )


@settings
class Study:
    """A comparison. Keys of ``methods`` are names; see `moa.studies.methods.Method` for what an entry holds."""

    methods: dict[str, Method] = knob(dict, "name: preset, changes, spans, grow, budgets")
    budgets: Budgets = knob(
        list, "trained parameters at which methods are compared; of span methods, shares of the KV cache"
    )
    claims: list[Claim] = knob(list, "what the study is to decide: better, than, text, budgets, metric")
    title: str = knob("A comparison of fine-tuning methods", "of the page")
    note: str = knob("", "a paragraph for the page: what is compared and why")
    output: str = knob("study", "folder for cells, table, JSON and page")
    base: str = knob("embedded", "base model: smollm2, a folder, a .gguf file, owner/name on the hub, or embedded")
    data: StudyData = knob(StudyData, "a section")
    calibration: Calibration = knob(Calibration, "a section")
    steps: int = knob(300, "optimizer steps of every stage of every cell", ge=2)
    batch_size: int = knob(32, "rows per step, and per batch of the evaluation", ge=1)
    seeds: Several[int] = knob(lambda: [0, 1, 2, 3, 4], "of initial weights and data order; paired between methods")
    tolerance: float = knob(0.01, "how far trained parameters may be off the budget", ge=0, le=0.5)
    metrics: Several[str] = knob(
        lambda: ["accuracy", "answer_loss"], "what is measured; the first decides claims that name none"
    )
    snapshots: int = knob(3, "points of training at which the routers are looked at", ge=1)
    tuning: Tuning = knob(Tuning, "a section")
    training: dict[str, Any] = knob(dict, "other keys of a recipe, for all methods")

    @field_validator("methods", mode="before", json_schema_input_type=dict[str, dict[str, Any] | None])
    @classmethod
    def _named(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {name: one if isinstance(one, Method) else Method.from_tree(name, one) for name, one in given.items()}

    def __post_init__(self) -> None:
        check_names("metrics", self.metrics, METRICS)
        _check_numbers(self)
        if not self.methods:
            raise ValueError("methods is empty: name at least one, e.g. soft-moa")
        for name, method in self.methods.items():
            method.check(name, self.budgets)
        for claim in self.claims:
            claim.check(self)
        _check_training("training", self.training)
        for name, method in self.methods.items():
            _check_training(f"methods.{name}: training", method.training)

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Study:
        """A study from a YAML file, with flags laid over it.

        Raises:
            FileNotFoundError: no such file; names a near one.
            ValueError: as `moa.settings.load`.
        """
        return load(cls, find(path, "study"), overrides)

    @property
    def dtype(self) -> str:
        """Of the base model."""
        return str(self.training.get("dtype", "auto"))

    def budgets_of(self, method: str) -> list[float]:
        """The budgets at which a method takes part."""
        return self.methods[method].budgets or self.budgets

    def rates_of(self, method: str) -> list[float]:
        """The learning rates that a method may have."""
        return self.methods[method].learning_rates or self.tuning.learning_rates

    def tried_budget(self, method: str, budget: float) -> float:
        """Where the learning rate for ``budget`` is tried."""
        alone = self.tuning.budget
        return alone if alone is not None and alone in self.budgets_of(method) else budget

    def chooses(self, method: str) -> bool:
        """Whether a method has to try learning rates."""
        return self.methods[method].trains and len(self.rates_of(method)) > 1


def _check_training(what: str, section: dict[str, Any]) -> None:
    if decided := [key for key in section if key in DECIDED]:
        raise ValueError(f"{what} has no key {decided[0]!r}; a study sets it for all methods")
    with named(what):
        Recipe(**section)


def _check_numbers(study: Study) -> None:
    """Lists of numbers: each at least one, none twice, all in range."""
    lists: list[tuple[str, Sequence[float], float]] = [
        ("budgets", study.budgets, 1e-3),
        ("seeds", study.seeds, 0),
        ("tuning.seeds", study.tuning.seeds, 0),
        ("tuning.learning_rates", study.tuning.learning_rates, 1e-12),
        *((f"methods.{name}: learning_rates", study.rates_of(name), 1e-12) for name in study.methods),
    ]
    for name, values, low in lists:
        if not values or len(set(values)) < len(values) or min(values) < low:
            raise ValueError(f"{name}={values!r} must list one or more different numbers of at least {low}")
    if shared := set(study.seeds) & set(study.tuning.seeds):
        raise ValueError(f"tuning.seeds share {sorted(shared)} with seeds: what chose a rate must not be compared")
    if study.tuning.budget is not None and study.tuning.budget not in study.budgets:
        raise ValueError(f"tuning.budget={study.tuning.budget} is not one of the budgets {study.budgets}")
