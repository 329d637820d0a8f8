"""Methods of a study: an adapter, attention spans, or both, and how they take part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any

from moa.choices import check_names, named, nearest
from moa.settings import Several, settings

if TYPE_CHECKING:
    from moa.adapters.config import MoAConfig
    from moa.studies.sizing import Sizable

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
    budgets: Several[float] = field(default_factory=list)
    learning_rates: Several[float] = field(default_factory=list)
    note: str = ""
    spans: str = ""
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.budgets = [whole(budget) for budget in self.budgets]

    @classmethod
    def from_tree(cls, name: str, tree: Any) -> Method:
        """``name: {preset: ..., changes...}``; the preset is the name itself if there is none."""
        if not isinstance(tree, Mapping | None):
            raise ValueError(f"methods.{name}={tree!r} must be a section with keys of its own, or empty")
        fields = dict(tree or {})
        if "changes" not in fields:  # which is how `dataclasses.asdict` writes it
            keys = ("preset", "grow", "budgets", "learning_rates", "note", "spans", "training")
            own = {key: fields.pop(key) for key in keys if key in fields}
            usual = NONE if own.get("spans") else name
            fields = {"preset": usual} | own | {"changes": fields}
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

    def check(self, name: str, budgets: list[float]) -> None:
        """Raise ValueError, naming the method, unless it can be configured."""
        if not name.isprintable() or not 0 < len(name) <= LONGEST or set(name) & set("/\\ "):
            raise ValueError(f"methods: the name {name!r} must be up to {LONGEST} letters without spaces or slashes")
        for budget in self.budgets:
            if budget not in budgets:
                raise ValueError(f"methods.{name}: budgets names {budget}, but the study has {budgets}")
        self._check_spans(name, self.budgets or budgets)
        if not self.trains:
            if self.changes or self.grow or self.training:
                raise ValueError(f"methods.{name}: preset 'none' trains nothing, so it takes no {[*self.changes]}")
            return
        from moa.adapters.config import MoAConfig
        from moa.adapters.presets import adapter_config
        from moa.studies.sizing import SIZED

        try:
            config = adapter_config({"preset": self.preset, **self.changes})
            if self.grow:
                check_names("grow", self.grow, SIZED)
        except (ValueError, TypeError) as error:
            raise ValueError(f"methods.{name}: {error}") from None
        if isinstance(config, MoAConfig):
            _check_grows(name, config, self.grow)

    def _check_spans(self, name: str, budgets: list[float]) -> None:
        known = (*BUILT, DENSE)
        if (
            self.spans
            and self.spans not in known
            and not self.spans.startswith(PRESS)
            and not self.spans.endswith(".json")
        ):
            raise ValueError(
                f"methods.{name}: spans={self.spans!r} is not one of {list(known)}{nearest(self.spans, known)}, a "
                f"plan's .json file, or {PRESS}CLASS"
            )
        if self.builds and self.trains:
            raise ValueError(
                f"methods.{name}: spans={self.spans!r} makes a plan for a share of the KV cache, and preset "
                f"{self.preset!r} trains a number of parameters: a budget is one or the other. Make the plan first and "
                "name its file"
            )
        if wrong := [budget for budget in budgets if (budget <= 1 and self.trains) or (budget > 1 and self.builds)]:
            wanted = "numbers of trained parameters" if self.trains else "shares of the KV cache, at most 1"
            raise ValueError(f"methods.{name}: its budgets must be {wanted}, not {wrong}")

    def variants(self, blocks: int) -> Iterator[Sizable]:
        """Ways to size the method on a base of ``blocks`` decoder blocks, nearest to its configuration first."""
        from peft import LoraConfig

        from moa.adapters.config import MoAConfig
        from moa.adapters.presets import adapter_config
        from moa.studies.sizing import SIZED, Mixture, PeftLora, lily_variants

        section = {"preset": self.preset, **self.changes}
        config = adapter_config(section)
        if isinstance(config, MoAConfig):
            yield Mixture(section, config, self.grow or SIZED, blocks)
        elif isinstance(config, LoraConfig):
            yield PeftLora(section, config, blocks)
        else:
            yield from lily_variants(section, config)


def _check_grows(name: str, config: MoAConfig, grow: list[str]) -> None:
    from moa.studies.sizing import SIZED

    kinds = {expert.kind for expert in config.experts}
    sized = sorted(kinds & set(SIZED))
    if not kinds & set(grow or SIZED):
        raise ValueError(f"methods.{name}: nothing can grow with the budget; its experts with a size are {sized}")
    for kind in grow:
        if kind not in kinds:
            raise ValueError(f"methods.{name}: grow names {kind!r}, but its experts are {sized}{nearest(kind, kinds)}")
