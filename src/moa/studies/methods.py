"""Methods of a study: an adapter, attention spans, or both, and how they take part."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any

from pydantic import AfterValidator

from moa.choices import check_choice, check_names, named
from moa.settings import Several, settings

NONE = "none"
"""The preset of what is not trained: the base alone, or under spans."""

DENSE = "dense"
LONGEST = 100  # letters of a name, which is part of file names
CALIBRATED = ("searched", "layers", "two-class")
BUILT = (*CALIBRATED, "uniform")
"""Plans that are made for a share of the KV cache; see `moa.studies.spans`."""
PRESS = "kvpress:"


def whole(budget: float) -> float:
    """A budget as it is written: numbers of parameters are whole."""
    return int(budget) if budget > 1 and float(budget).is_integer() else budget


Budgets = Several[Annotated[float, AfterValidator(whole)]]


def amount(budget: float) -> str:
    """A budget for people: trained parameters, or a share of the KV cache."""
    return f"{budget:,} parameters" if budget > 1 else f"{100 * budget:g} % of the KV cache"


@settings
class Method:
    """An entry of a study.

    Attributes:
        preset: a preset of moa; ``peft:lora``, ``peft:dora``, ``peft:lily``: the same run by PEFT itself; or ``none``.
        spans: how the model attends when it is measured: the name of a plan that is made for the budget (`BUILT`, with
            preset ``none``), a plan's file, ``kvpress:CLASS``, or ``dense``. If empty, as it was trained.
        training: keys of a recipe laid over the study's own for this method, such as ``spans``: a plan to learn under.
        changes: settings laid over the preset, anything that `moa.preset` (or PEFT's configuration) takes.
        grow: kinds of experts whose sizes follow the budget; all that have one if empty.
        budgets: where the method takes part; at all budgets of the study if empty.
        learning_rates: what it tries in place of ``tuning.learning_rates``; one alone is taken without a try.
        note: a line for the page.
    """

    preset: str
    changes: dict[str, Any] = field(default_factory=dict)
    grow: Several[str] = field(default_factory=list)
    budgets: Budgets = field(default_factory=list)
    learning_rates: Several[float] = field(default_factory=list)
    note: str = ""
    spans: str = ""
    training: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_tree(cls, name: str, tree: Any) -> Method:
        """``name: {preset: ..., changes...}``; the preset is the name itself if there is none."""
        if not isinstance(tree, Mapping | None):
            raise ValueError(f"methods.{name}={tree!r} must be a section with keys of its own, or empty")
        fields = dict(tree or {})
        if "changes" not in fields:  # which is how `dataclasses.asdict` writes it
            own = {entry.name: fields.pop(entry.name) for entry in dataclasses.fields(cls) if entry.name in fields}
            fields = {"preset": NONE if own.get("spans") else name} | own | {"changes": fields}
        with named(f"methods.{name}"):
            return cls(**fields)

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return self.preset != NONE

    @property
    def builds(self) -> bool:
        """Whether its budget is a share of the KV cache."""
        return self.spans in BUILT or self.spans.startswith(PRESS)

    @property
    def section(self) -> dict[str, Any]:
        """The adapter of a recipe, before it is sized."""
        return {"preset": self.preset, **self.changes}

    def check(self, name: str, budgets: list[float]) -> None:
        """Raise ValueError, naming the method, unless it can be configured."""
        if not name.isprintable() or not 0 < len(name) <= LONGEST or set(name) & set("/\\ "):
            raise ValueError(f"methods: the name {name!r} must be up to {LONGEST} letters without spaces or slashes")
        check_budgets(f"methods.{name}", self.budgets, budgets)
        with named(f"methods.{name}"):
            self._check_spans(self.budgets or budgets)
            if self.trains:
                self._check_adapter()
            elif unread := [
                *self.changes,
                *(key for key in ("grow", "learning_rates", "training") if getattr(self, key)),
            ]:
                raise ValueError(f"preset 'none' trains nothing, so it takes no {unread}")

    def _check_spans(self, budgets: list[float]) -> None:
        if self.spans and not self.spans.startswith(PRESS) and not self.spans.endswith(".json"):
            check_choice("spans", self.spans, (*BUILT, DENSE, "PLAN.json", f"{PRESS}CLASS"))
        if self.builds and self.trains:
            raise ValueError(
                f"spans={self.spans!r} makes a plan for a share of the KV cache, and preset {self.preset!r} trains a "
                "number of parameters: a budget is one or the other. Make the plan first and name its file"
            )
        if wrong := [budget for budget in budgets if (budget <= 1 and self.trains) or (budget > 1 and self.builds)]:
            wanted = "numbers of trained parameters" if self.trains else "shares of the KV cache, at most 1"
            raise ValueError(f"its budgets must be {wanted}, not {wrong}")

    def _check_adapter(self) -> None:
        from moa.adapters.config import MoAConfig
        from moa.adapters.presets import adapter_config

        config = adapter_config(self.section)
        if isinstance(config, MoAConfig):
            sized = sorted({expert.kind for expert in config.experts if expert.size_setting is not None})
            if not sized:
                raise ValueError("nothing can grow with the budget: none of its experts has a size")
            check_names("grow", self.grow or sized, sized)
        elif self.grow:
            raise ValueError(f"grow={self.grow} names experts of a mixture, and {self.preset!r} has none: leave it out")


def check_budgets(what: str, own: list[float], budgets: list[float]) -> None:
    """Raise ValueError for a budget that is not one of the study's."""
    if others := [budget for budget in own if budget not in budgets]:
        raise ValueError(f"{what}: budgets names {others[0]}, but the study has {budgets}")
