"""Who sits where: a configuration and a block's architecture become a list of placements and gate columns.

Nothing is attached here, so that a configuration that does not fit a model fails before the model is touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from moa.adapters.architectures import PROJECTIONS, BlockView, Host
from moa.adapters.attention_interface import uses_interface
from moa.adapters.config import MoAConfig
from moa.adapters.experts.base import ExpertConfig, column_position
from moa.adapters.structure import describe

PROBED = ("position_embeddings", "attention_mask")
"""What the prompt expert can give to an attention module beside its tokens."""

SPLIT_VALUES = ("diffllama",)


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
    seen: set[tuple[str, str]] = set()
    for placement in plan.placements:
        shared = placement.expert.gate
        # Sites of one kind under a common gate are one column, named after the kind.
        kind = placement.name if shared is None else placement.expert.kind
        driver = f"site {placement.name}" if shared is None else f"gate {shared}"
        if driver not in drivers:
            drivers.append(driver)
        if (driver, kind) not in seen:
            seen.add((driver, kind))
            plan.columns.append(_unused(kind, plan.columns))
            plan.outputs.append(drivers.index(driver))
        if config.router is not None:
            placement.output = drivers.index(driver)
    chosen = getattr(config.gating, "k", 0)
    if config.router is not None and drivers and chosen > len(drivers):
        raise ValueError(
            f"topk gating: k={chosen}, but block {block.index} has {len(drivers)} gates: {plan.columns}. Choose a "
            "smaller k, or give the block more experts"
        )
    return plan


def check_routers_learn(config: MoAConfig, plans: Iterable[BlockPlan]) -> None:
    """Raise ValueError if what a router says changes no weight in any block: no loss would show it."""
    outputs = [len(set(plan.outputs)) for plan in plans if plan.placements]
    routers = [] if config.router is None else [("router", config.gating, outputs)]
    for expert in config.experts:
        if (number := expert.copies.number) > 1:
            routers.append((f"{expert.kind} expert: copies", expert.copies.gating, [number]))
    for what, gating, numbers in routers:
        if not gating.has_auxiliary_loss and not any(map(gating.decides, numbers)):
            raise ValueError(
                f"{what}: {gating.kind} gating gives the only expert that it takes of {max(numbers)} the same weight, "
                "whatever the router says, so that it would learn nothing. Choose soft or threshold gating, topk with "
                "k=2 or more, or no router"
            )


def _unused(name: str, taken: list[str]) -> str:
    """``name``, or ``"name#2"`` and so on if it is among those taken: a kind may stand under several gates."""
    numbered = (f"{name}#{number}" for number in range(2, len(taken) + 2))
    return name if name not in taken else next(free for free in numbered if free not in taken)


def _placements(config: MoAConfig, block: BlockView, family: str) -> Iterator[Placement]:
    taken: dict[str, int] = {}
    for expert in config.experts:
        if block.index not in layers_of(expert, config, block.index + 1):
            continue
        for site in expert.sites():
            why = obstacle(block, site.role, expert, config)
            host = block.host(site.role)
            if why is not None or host is None:
                raise ValueError(
                    f"the {expert.kind} expert cannot sit at {site.role!r} in block {block.index} of {family}: {why}. "
                    f"{_way_out(expert, site.role, block)}"
                )
            taken[site.name] = taken.get(site.name, 0) + 1
            name = site.name if taken[site.name] == 1 else f"{site.name}#{taken[site.name]}"
            yield Placement(name, site.role, expert, host)


def layers_of(expert: ExpertConfig, config: MoAConfig, blocks: int) -> list[int]:
    """Numbers of the blocks, of ``blocks``, that are to get this expert."""
    limits = [layers for layers in (expert.layers, config.layers_to_transform) if layers is not None]
    return [index for index in range(blocks) if all(index in layers for layers in limits)]


def obstacle(block: BlockView, role: str, expert: ExpertConfig, config: MoAConfig) -> str | None:
    """Why this block certainly has no place for ``role``; None: it has one.

    Raises:
        ValueError: nothing was found and nothing says that there is none; the message lists what there is. Or there is
            a place, which tensor parallelism splits in a way that the expert cannot follow.
    """
    if role in ("k", "v") and block.architecture.qkv_layout == "latent" and config.router is not None:
        return (
            "every step of decoding computes the keys and values of all cached tokens anew from compressed ones, and "
            "the router's gates for those are gone"
        )
    host = block.host(role)
    if host is None and role in block.absent:
        return block.absent[role]
    if host is None:
        raise ValueError(
            f"MoA is not sure which module of block {block.index} of {block.config.model_type} is {role!r}, which the "
            f"{expert.kind} expert needs. The block's linear layers are {describe(block.module)}. Name it with "
            f"MoAConfig(architecture={{{role!r}: 'path.in.the.block'}}), or say {role!r}: None if there is none"
        )
    why = None
    if role == "attention":
        inside = expert.needs_attention_interface
        why = _interface_obstacle(block, host) if inside else _output_obstacle(block, host)
    if why is None:
        _check_split(block, role, expert)
    return why


def _check_split(block: BlockView, role: str, expert: ExpertConfig) -> None:
    """Raise ValueError if the expert cannot follow how tensor parallelism splits its host.

    Optional experts are not left out for that: what is trained must not depend on the number of processes.
    """
    if block.parallel is None:
        return
    why = expert.obstacle_to_splitting() or block.split_obstacle(role, heads=expert.needs_attention_interface)
    if why is not None:
        raise ValueError(
            f"the {expert.kind} expert cannot follow {role!r} in block {block.index} of {block.config.model_type}, "
            f"which tensor parallelism splits: {why}. Leave it out, or load the base without tp_plan"
        )


def _output_obstacle(block: BlockView, host: Host) -> str | None:
    """Why what an attention module puts out is not what its block adds to the residual stream."""
    path, output = block.architecture.attention, block.architecture.o
    if output is not None and not output.startswith(f"{path}."):
        return f"its attention's output projection {output!r} comes after the module {path!r} that would host it"
    if "residual" in inspect.signature(type(host.module).forward).parameters:
        return "its attention adds the residual stream itself"
    return None


def _interface_obstacle(block: BlockView, host: Host) -> str | None:
    """Why an attention module cannot host prompts, whose keys and values come from running it up to the interface."""
    attention = host.module
    if not uses_interface(attention):
        return "its attention does not go through transformers' attention interface"
    if "k" in block.absent or "v" in block.absent:
        return "its attention has no keys and values of its own to give to a prompt"
    if block.config.model_type in SPLIT_VALUES:
        return "its attention attends twice, with one half of the values each time"
    inside = [name.rpartition(".")[2] for name, _ in attention.named_modules()]
    if "rotary_emb" in inside:
        return "its attention rotates keys itself, and a prompt has no positions"
    if "indexer" in inside:
        return "its attention picks keys by an index, in which a prompt has no entries"
    first, *others = list(inspect.signature(type(attention).forward).parameters.values())[1:]
    needs = [p.name for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    unknown = [name for name in needs if name not in PROBED]
    if first.name != "hidden_states" or unknown:
        return f"its attention cannot be run on a prompt alone, it also needs {unknown or first.name}"
    return None


def _way_out(expert: ExpertConfig, role: str, block: BlockView) -> str:
    offered = [name for name in PROJECTIONS if block.host(name) is not None]
    if hasattr(expert, "targets"):
        first = f"Leave {role!r} out of the expert's targets; this block offers {offered}"
    else:
        first = "Leave that expert out, e.g. MoAConfig(experts=[LoraExpert(), ParallelExpert()])"
    if role in ("gate", "up", "down") and block.host("mlp") is not None:
        first += ", and a parallel expert beside its feed-forward module"
    return (
        f"{first}. Or restrict the expert to other blocks with layers=[...], or give it optional=True to leave out "
        "whatever a block cannot host"
    )
