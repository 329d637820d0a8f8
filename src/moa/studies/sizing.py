"""Which sizes of a method may grow, and the recipe's adapter section with other sizes.

Sizes are split into *parts*: one setting of one expert at one place of the blocks (the rank on ``q``, the width of the
parallel adapter, ...). A part has a unit in every block of the expert, and units of one part differ by at most one, so
that budgets are met closely while the method stays what it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from peft import LoraConfig

from moa.adapters.config import MoAConfig
from moa.adapters.experts import EXPERTS, ExpertConfig
from moa.adapters.presets import adapter_config
from moa.choices import plain

SIZED = [kind for kind, layer in EXPERTS.items() if layer.config.size_setting is not None]
"""The kinds of experts with a setting that makes them larger; others keep their size."""

_NUMBERS_OF_B = (2, 3, 4, 5, 6, 7, 8)


class Part(NamedTuple):
    """Units of one size.

    Attributes:
        name: for people, e.g. ``"lora r on q"``.
        configured: the size that the method's own configuration says.
        layers: the blocks that have a unit, or one stand-in where a size holds for the whole model.
    """

    name: str
    configured: float
    layers: list[int]


class Size(NamedTuple):
    """``value`` in every unit of a part, and one more in the first ``raised`` of them."""

    value: int
    raised: int = 0

    def spread(self, layers: list[int]) -> list[tuple[int, list[int]]]:
        """The blocks that have either value, where there are any."""
        parts = [(self.value + 1, layers[: self.raised]), (self.value, layers[self.raised :])]
        return [(value, chosen) for value, chosen in parts if chosen]


class Sizable(Protocol):
    """What the budget solver asks of a method. ``parts`` and the arguments of ``section`` have the same order."""

    parts: list[Part]

    def section(self, sizes: list[Size]) -> dict[str, Any]:
        """The recipe's ``adapter`` section with these sizes."""


class Mixture:
    """A Mixture of Adapters: one part for every target of every expert that may grow."""

    def __init__(self, section: dict[str, Any], config: MoAConfig, grow: list[str], blocks: int):
        # Settings of experts (r=16, ...) are in the experts by now, and would be laid over the solved sizes again.
        own = {"preset", *(entry.name for entry in dataclasses.fields(MoAConfig))}
        self._section = {key: value for key, value in section.items() if key in own}
        self._experts = config.experts
        self._blocks = list(range(blocks))
        self._owners: list[tuple[int, str | None]] = []
        self.parts: list[Part] = []
        for place, expert in enumerate(config.experts):
            setting = expert.size_setting
            if expert.kind not in grow or setting is None:
                continue
            for target in getattr(expert, "targets", [None]):
                name = f"{expert.kind} {setting}" + (f" on {target}" if target else "")
                self.parts.append(Part(name, getattr(expert, setting), expert.layers or self._blocks))
                self._owners.append((place, target))

    def section(self, sizes: list[Size]) -> dict[str, Any]:
        experts: list[dict[str, Any]] = []
        for place, expert in enumerate(self._experts):
            own = {t: size for (owner, t), size in zip(self._owners, sizes, strict=True) if owner == place}
            experts += [plain(piece) for piece in (self._split(expert, own) if own else [expert])]
        return self._section | {"experts": experts}

    def _split(self, expert: ExpertConfig, sizes: dict[str | None, Size]) -> list[ExpertConfig]:
        """The expert as few experts, each of one size; targets of equal size in the same blocks stay together."""
        layers = expert.layers or self._blocks
        together: dict[tuple[int, tuple[int, ...]], list[str | None]] = {}
        for target, size in sizes.items():
            for value, chosen in size.spread(layers):
                together.setdefault((value, tuple(chosen)), []).append(target)
        pieces = []
        for (value, places), targets in together.items():
            changes: dict[str, Any] = {"layers": expert.layers if list(places) == layers else list(places)}
            if hasattr(expert, "targets"):
                changes["targets"] = targets
            pieces.append(expert.resized(value, **changes))
        return pieces


class PeftLora:
    """PEFT's LoRA or DoRA: one part for every target module, sizes in its ``rank_pattern``."""

    def __init__(self, section: dict[str, Any], config: LoraConfig, blocks: int):
        self._section = section
        self._scaling = config.lora_alpha / config.r if "lora_alpha" in section else 1.0
        if isinstance(config.target_modules, str):
            raise ValueError(
                f"target_modules={config.target_modules!r} must be a list of names for its ranks to be set"
            )
        self._targets = sorted(config.target_modules or [])
        self.parts = [Part(f"r on {target}", config.r, list(range(blocks))) for target in self._targets]

    def section(self, sizes: list[Size]) -> dict[str, Any]:
        ranks: dict[str, int] = {}
        for target, size, part in zip(self._targets, sizes, self.parts, strict=True):
            for value, layers in size.spread(part.layers):
                ranks[rf"\w+\.({'|'.join(map(str, layers))})\.(.*\.)?{target}"] = value
        alphas = {pattern: self._scaling * rank for pattern, rank in ranks.items()}
        return self._section | {"rank_pattern": ranks, "alpha_pattern": alphas}


class PeftLily:
    """PEFT's Lily: one rank for the whole model, given the number of its shared B matrices."""

    def __init__(self, section: dict[str, Any], config: Any):
        self._section = section
        self.parts = [Part("r", config.r, [0])]

    def section(self, sizes: list[Size]) -> dict[str, Any]:
        return self._section | {"r": sizes[0].value + sizes[0].raised}


def variants(section: dict[str, Any], grow: list[str], blocks: int) -> Iterator[Sizable]:
    """Ways to size an adapter on a base of ``blocks`` decoder blocks, nearest to its configuration first.

    Args:
        section: the adapter as a recipe has it.
        grow: kinds of experts that follow the budget; all that have a size if empty.
        blocks: of the base.
    """
    config = adapter_config(section)
    if isinstance(config, MoAConfig):
        yield Mixture(section, config, grow or SIZED, blocks)
    elif isinstance(config, LoraConfig):
        yield PeftLora(section, config, blocks)
    else:
        # Lily's rank moves in large steps, so unless the study sets the number of B matrices, others may be taken.
        given = config.num_B  # type: ignore[attr-defined]
        others = [] if "num_B" in section else sorted(set(_NUMBERS_OF_B) - {given}, key=lambda n: abs(n - given))
        for number in [given, *others]:
            yield PeftLily(section | {"num_B": number}, config)
