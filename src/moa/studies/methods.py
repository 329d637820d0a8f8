"""Methods of a study: a preset with changes, and how it takes part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moa.choices import check_names, nearest

if TYPE_CHECKING:
    from moa.adapters.config import MoAConfig
    from moa.studies.sizing import Sizable


@dataclass
class Method:
    """An entry of a study.

    Attributes:
        preset: a preset of moa, or ``peft:lora``, ``peft:dora``, ``peft:lily``: the same run by PEFT itself.
        changes: settings laid over the preset, anything that `moa.preset` (or PEFT's configuration) takes.
        grow: kinds of experts whose sizes follow the budget; all that have one if empty.
        budgets: where the method takes part; at all budgets of the study if empty.
        note: a line for the page.
    """

    preset: str
    changes: dict[str, Any] = field(default_factory=dict)
    grow: list[str] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    note: str = ""

    @classmethod
    def from_tree(cls, name: str, tree: Any) -> Method:
        """``name: {preset: ..., changes...}``; the preset is the name itself if there is none."""
        if not isinstance(tree, Mapping | None):
            raise ValueError(f"methods.{name}={tree!r} must be a section with keys of its own, or empty")
        fields = dict(tree or {})
        if "changes" in fields:  # as `dataclasses.asdict` wrote it
            return cls(**fields)
        own = {key: fields.pop(key) for key in ("preset", "grow", "budgets", "note") if key in fields}
        return cls(**({"preset": name} | own), changes=fields)

    def check(self, name: str, budgets: list[int]) -> None:
        """Raise ValueError, naming the method, unless it can be configured."""
        if not name.strip() or set(name) & set("/\\ "):
            raise ValueError(f"methods: the name {name!r} must have no spaces or slashes")
        from moa.adapters.config import MoAConfig
        from moa.studies.sizing import SIZED
        from moa.training.adapter import adapter_config

        try:
            config = adapter_config({"preset": self.preset, **self.changes})
            if self.grow:
                check_names("grow", self.grow, SIZED)
        except (ValueError, TypeError) as error:
            raise ValueError(f"methods.{name}: {error}") from None
        for budget in self.budgets:
            if budget not in budgets:
                raise ValueError(f"methods.{name}: budgets names {budget}, but the study has {budgets}")
        if isinstance(config, MoAConfig):
            _check_grows(name, config, self.grow)

    def variants(self, blocks: int) -> Iterator[Sizable]:
        """Ways to size the method on a base of ``blocks`` decoder blocks, nearest to its configuration first."""
        from peft import LoraConfig

        from moa.adapters.config import MoAConfig
        from moa.studies.sizing import SIZED, Mixture, PeftLora, lily_variants
        from moa.training.adapter import adapter_config

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
