"""Who sits where: a configuration and a block's architecture become a list of placements and gate columns.

Nothing is attached here, so that a configuration that does not fit a model fails before the model is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from moa.adapters.architectures import BlockView, Host
from moa.adapters.attention_interface import uses_interface
from moa.adapters.config import MoAConfig
from moa.adapters.experts import ExpertConfig

# The official implementation's order of gates; experts of other kinds come after, in the order of the configuration.
COLUMN_ORDER = ("lora", "q", "k", "v", "prompt", "o", "up", "gate", "down", "parallel")


@dataclass
class Placement:
    """One expert at one site: where, and which output of the router gates it (None: no router)."""

    name: str
    role: str
    expert: ExpertConfig
    host: Host
    output: int | None = None


@dataclass
class BlockPlan:
    """All placements of one block.

    Attributes:
        placements: in the order of their columns.
        columns: names of the gate columns.
        outputs: column -> which router output drives it; columns that share a gate share an output.
    """

    placements: list[Placement] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)


def plan_block(config: MoAConfig, block: BlockView, family: str) -> BlockPlan:
    """Place every expert of ``config`` that belongs into this block.

    Raises:
        ValueError: the family cannot host an expert; the message names both and the way out.
    """
    plan = BlockPlan(sorted(_placements(config, block, family), key=lambda p: column_position(p.name)))
    drivers: list[str] = []
    for placement in plan.placements:
        shared = placement.expert.gate
        # Sites of one kind under a common gate are one column, named after the kind.
        column = placement.name if shared is None else placement.expert.kind
        driver = f"site {placement.name}" if shared is None else f"gate {shared}"
        if driver not in drivers:
            drivers.append(driver)
        if column not in plan.columns:
            plan.columns.append(column)
            plan.outputs.append(drivers.index(driver))
        if config.router is not None:
            placement.output = drivers.index(driver)
    return plan


def column_position(name: str) -> int:
    """Where a gate column stands among the others; unknown names come last."""
    name = name.partition("#")[0]
    return COLUMN_ORDER.index(name) if name in COLUMN_ORDER else len(COLUMN_ORDER)


def _placements(config: MoAConfig, block: BlockView, family: str) -> Iterator[Placement]:
    taken: dict[str, int] = {}
    for expert in config.experts:
        if expert.layers is not None and block.index not in expert.layers:
            continue
        for site in expert.sites():
            host = block.host(site.role)
            if host is None:
                raise ValueError(_no_host(expert, site.role, family, block))
            if site.role == "attention" and not uses_interface(host.module):
                raise ValueError(
                    f"the {expert.kind} expert cannot sit in {family}: its attention does not go through "
                    "transformers' attention interface. Leave that expert out, e.g. "
                    "MoAConfig(experts=[LoraExpert(), ParallelExpert()])."
                )
            taken[site.name] = taken.get(site.name, 0) + 1
            name = site.name if taken[site.name] == 1 else f"{site.name}#{taken[site.name]}"
            yield Placement(name, site.role, expert, host)


def _no_host(expert: ExpertConfig, role: str, family: str, block: BlockView) -> str:
    roles = ("q", "k", "v", "o", "gate", "up", "down", "mlp", "attention")
    offered = [name for name in roles if block.host(name) is not None]
    stacked = block.host("mlp") is not None and block.host("down") is None and role in ("gate", "up", "down")
    why = " (its experts' weights are stacked 3-D parameters, not linear layers)" if stacked else ""
    return (
        f"the {expert.kind} expert needs {role!r}, which block {block.index} of {family} does not have as a linear "
        f"layer or module{why}. This block offers {offered}: leave {role!r} out of the expert's targets, restrict "
        "the expert to other blocks with layers=[...], or use a parallel expert beside the MLP."
    )
