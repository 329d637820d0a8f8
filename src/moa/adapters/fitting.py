"""Defaults adapt, requests fail: what a model cannot host of optional experts is left out, and that is said once.

The configuration that comes out names exactly what is placed, block by block where blocks differ, so that saving and
loading it neither adapts nor warns again.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from moa.adapters.architectures import BlockView
from moa.adapters.config import MoAConfig
from moa.adapters.experts import ExpertConfig
from moa.adapters.placement import layers_of, obstacle

Left = dict[tuple[str, str, str], list[int]]
"""(kind of expert, role, reason) -> numbers of the blocks where it is left out."""


def fit(config: MoAConfig, views: Mapping[str, BlockView]) -> MoAConfig:
    """``config`` with its optional experts cut to what the blocks can host; the same object if it has none.

    Raises:
        ValueError: a block number that the model does not have, a router that cannot read the blocks, or nothing is
            left to place.
    """
    blocks = list(views.values())
    _check_layers(config, len(blocks))
    for block in blocks:
        _check_router(config, block)
        _check_text(config, block, len(blocks))
    if not any(expert.optional for expert in config.experts):
        return config
    left: Left = {}
    experts: list[ExpertConfig] = []
    for expert in config.experts:
        experts += _fitted(expert, config, blocks, left) if expert.optional else [expert]
    fitted = copy.copy(config)
    fitted.experts = experts
    if left:
        _report(left, fitted, blocks)
    return fitted


def _check_layers(config: MoAConfig, blocks: int) -> None:
    named = {f"{expert.kind} expert: layers": expert.layers for expert in config.experts}
    for what, layers in (*named.items(), ("layers_to_transform", config.layers_to_transform)):
        beyond = [layer for layer in layers or [] if layer >= blocks]
        if beyond:
            raise ValueError(f"{what}={beyond}, but the model has {blocks} blocks, 0 to {blocks - 1}")
    if not any(layers_of(expert, config, blocks) for expert in config.experts):
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform} has no block in common with any expert's layers"
        )


def _check_router(config: MoAConfig, block: BlockView) -> None:
    """Raise ValueError if the router cannot read what this block reads."""
    router = config.router
    gatings = [config.gating, *(expert.copies.gating for expert in config.experts)]
    losses = any(gating.has_auxiliary_loss for gating in gatings)
    reads_one = router is None or (router.input == "attention" and router.level == "token")
    if block.streams_first is None or (reads_one and not losses):
        return
    raise ValueError(
        f"the blocks of {block.config.model_type} read several residual streams at once, which is not one vector per "
        "token to decide on. Let the router read what attention reads, one decision per token, without auxiliary "
        "losses: router={'input': 'attention', 'level': 'token'}"
    )


def _check_text(config: MoAConfig, block: BlockView, blocks: int) -> None:
    """Raise ValueError if the router decides for a text of which this block may be given no more than the end."""
    shared = getattr(block.config, "num_kv_shared_layers", 0) or 0
    if config.router is None or config.router.level == "token" or block.index < blocks - shared:
        return
    if any(block.index in layers_of(expert, config, blocks) for expert in config.experts):
        raise ValueError(
            f"block {block.index} of {block.config.model_type} takes its keys and values from an earlier one "
            f"(num_kv_shared_layers={shared}) and is run on the last tokens alone when no other logits are asked for, "
            f"as in generate(): a router of level={config.router.level!r} cannot decide for the text there. Use "
            f"router={{'level': 'token'}}, or layers_to_transform={[*range(blocks - shared)]}"
        )


def _fitted(expert: ExpertConfig, config: MoAConfig, blocks: Sequence[BlockView], left: Left) -> list[ExpertConfig]:
    """The expert once for every set of targets that some blocks can host, in the order of those blocks."""
    groups: dict[tuple[str, ...], list[int]] = {}
    layers = layers_of(expert, config, len(blocks))
    for index in layers:
        view = blocks[index]
        reasons = {site.role: obstacle(view, site.role, expert, config) for site in expert.sites()}
        for role, reason in reasons.items():
            if reason is not None:
                left.setdefault((expert.kind, role, reason), []).append(index)
        groups.setdefault(tuple(role for role, reason in reasons.items() if reason is None), []).append(index)
    return [
        _with_targets(expert, roles, expert.layers if len(groups) == 1 else indices)
        for roles, indices in groups.items()
        if roles
    ]


def _with_targets(expert: ExpertConfig, roles: tuple[str, ...], layers: list[int] | None) -> ExpertConfig:
    changes: dict[str, Any] = {"targets": list(roles)} if hasattr(expert, "targets") else {}
    return dataclasses.replace(expert, **changes, layers=layers, optional=False)


def _report(left: Left, fitted: MoAConfig, blocks: Sequence[BlockView]) -> None:
    """Warn of what is left out and what remains.

    Raises:
        ValueError: nothing remains.
    """
    family = blocks[0].config.model_type
    roles: dict[tuple[str, str], dict[str, list[str]]] = {}
    for (kind, role, why), indices in left.items():
        roles.setdefault((why, _in_blocks(indices, blocks)), {}).setdefault(kind, []).append(role)
    out = "; ".join(
        f"{' and '.join(_sites(kind, of) for kind, of in kinds.items())}{where}, because {why}"
        for (why, where), kinds in roles.items()
    )
    if not fitted.experts:
        raise ValueError(f"{family} can host nothing of this configuration. Left out: {out}")
    kept = "; ".join(
        f"{expert.kind}{' on ' + ', '.join(expert.targets) if hasattr(expert, 'targets') else ''}"
        f"{_in_blocks(layers_of(expert, fitted, len(blocks)), blocks)}"
        for expert in fitted.experts
    )
    warnings.warn(
        f"{family} cannot host all of this configuration's default experts. Left out: {out}. In place of it stands "
        f"what remains: {kept}. Name experts or targets yourself to have it refused instead",
        UserWarning,
        stacklevel=2,
    )


def _sites(kind: str, roles: list[str]) -> str:
    return f"the {kind} expert" if roles[0] in ("attention", "mlp") else f"{kind} on {', '.join(roles)}"


def _in_blocks(indices: list[int], blocks: Sequence[BlockView]) -> str:
    """``" in blocks 0-2, 5"``, or nothing if they are all."""
    if len(indices) == len(blocks):
        return ""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return (" in blocks " if len(indices) > 1 else " in block ") + ", ".join(
        str(a) if a == b else f"{a}-{b}" for a, b in runs
    )
