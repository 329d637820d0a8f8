"""What an inspection found, as plain data: `dataclasses.asdict` of an `Inspection` is JSON.

A *router* here is a block's router over its experts, or the router over the copies of one expert, which then has the
name of that expert's site. Its *columns* are what it decides about: experts ("q", "prompt") or copies ("q/0", "q/1").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class RouterStatistics:
    """What one router decided on the tokens of a set.

    Attributes:
        block: number of the decoder block.
        site: None for the block's router; else the expert whose copies it mixes.
        columns: names of its experts or copies; the lists below are in this order.
        tokens: how many tokens it saw.
        mean: mean gate.
        active: share of tokens with a gate other than 0.
        used: share of tokens with a gate above ``level``: the utilisation.
        strongest: share of tokens on which no other column has a larger gate; the first of equal ones.
        level: 0 for rules that switch experts off, see `moa.inspection.statistics.level_of`.
        entropy: mean over tokens of the entropy of the gates divided by their sum, over its largest possible value:
            0 one expert alone, 1 all alike. Tokens without an active expert are left out; None if nothing is left, or
            for a single column.
        silent: share of tokens on which every gate is 0.
        threshold: mean and standard deviation over tokens; None for rules without a threshold.
        dead: names of columns that are active on, or have a mean gate of, less than `moa.adapters.telemetry.DEAD`.
    """

    block: int
    site: str | None
    columns: list[str]
    tokens: int
    mean: list[float]
    active: list[float]
    used: list[float]
    strongest: list[float]
    level: float
    entropy: float | None
    silent: float
    threshold: tuple[float, float] | None
    dead: list[str]


@dataclass
class SetStatistics:
    """All routers on one data set.

    Attributes:
        name: of the data set; "all" for all sets together, every token counting alike.
        rows: texts read.
        tokens: tokens read.
        skipped: rows that did not fit into the model's context.
        routers: by block; the block's own router before those over copies.
    """

    name: str
    rows: int
    tokens: int
    skipped: int
    routers: list[RouterStatistics]


@dataclass
class Strongest:
    """Who has the largest gate on every token of an answer.

    Attributes:
        block: None: gates averaged over blocks.
        site: as in `RouterStatistics`.
        names: one per token; None where every gate is 0.
        gates: one per token.
    """

    block: int | None
    site: str | None
    names: list[str | None]
    gates: list[float]


@dataclass
class Example:
    """An answer that the model wrote itself, greedily.

    Attributes:
        set: name of the data set.
        prompt: what the model read.
        tokens: the answer, token by token.
        strongest: one entry per router, the average over blocks first if blocks have routers.
    """

    set: str
    prompt: str
    tokens: list[str]
    strongest: list[Strongest]


@dataclass
class Similarity:
    """How alike experts or copies are on the same tokens.

    Attributes:
        block: number of the decoder block.
        site: None for the block's experts; else the expert whose copies are compared.
        names: of rows and columns of the matrices.
        cka: debiased linear CKA; None where an expert's output is the same for all tokens.
        cosine: mean over tokens of the cosine between outputs; None where the experts write to different places.
    """

    block: int
    site: str | None
    names: list[str]
    cka: list[list[float | None]]
    cosine: list[list[float | None]] | None


@dataclass
class Inspection:
    """Everything about one adapter.

    Attributes:
        adapter: folder or hub name.
        base: name of the base model.
        template: prompt template.
        blocks: number of decoder blocks of the model.
        gating: of the block's routers, with its settings; None without routers.
        experts: names of the block routers' columns.
        bare: numbers of the blocks without any expert.
        pooled: all sets together.
        sets: one per data set.
        examples: answers.
        similarity: by block; empty if nothing could be compared.
        compared_tokens: tokens on which outputs were compared.
        notes: what could not be shown, and why.
    """

    adapter: str
    base: str
    template: str
    blocks: int
    gating: dict[str, Any] | None
    experts: list[str]
    bare: list[int]
    pooled: SetStatistics
    sets: list[SetStatistics]
    examples: list[Example]
    similarity: list[Similarity]
    compared_tokens: int
    notes: list[str]

    @property
    def dead(self) -> list[str]:
        """Dead experts and copies over all sets, as "block 3: prompt"."""
        return [f"block {router.block}: {name}" for router in self.pooled.routers for name in router.dead]
