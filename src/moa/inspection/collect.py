"""Gates of texts, token by token, as `moa.gate_values` records them. One text per forward, so nothing is padded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moa.adapters.experts.base import column_position
from moa.adapters.gating import Gating
from moa.adapters.members import experts_of, mixtures_of
from moa.adapters.telemetry import Decisions, Place, copy_names, gate_values


class RouterFacts(NamedTuple):
    """What is known about a router before it runs: its rule and the names of what it decides about."""

    gating: Gating
    columns: list[str]


def routers_of(model: nn.Module, adapter: str) -> dict[Place, RouterFacts]:
    """All routers of an adapter, block by block; empty for an adapter that has none."""
    routers = {}
    for mixture in mixtures_of(model):
        if adapter in mixture.router:
            routers[Place(mixture.index, None)] = RouterFacts(mixture.gating[adapter], mixture.columns[adapter])
        for layer in experts_of(mixture, adapter):
            copies = layer.router_over_copies(adapter)
            if copies is not None:
                names = copy_names(layer.site, layer.number_of_copies(adapter))
                routers[Place(mixture.index, layer.site)] = RouterFacts(copies.gating[adapter], names)
    return routers


def all_columns(columns: Iterable[Sequence[str]]) -> list[str]:
    """The names of several routers' columns, each once, in the order of gate columns."""
    return sorted(dict.fromkeys(name for names in columns for name in names), key=column_position)


def decisions_of(
    model: Any, adapter: str, texts: Sequence[Sequence[int]], progress: Callable[[], object] = lambda: None
) -> dict[Place, Decisions]:
    """Run the model over texts and keep what its routers decide.

    Args:
        model: in evaluation mode.
        adapter: whose routers.
        texts: token ids of each text.
        progress: called after each text.

    Returns:
        Per router its decisions on the tokens of all texts, one text after the other: gates (tokens, columns) and
        thresholds (tokens,), in float32 on the CPU.

    Raises:
        ValueError: a gate is not a finite number.
    """
    seen: dict[Place, list[Decisions]] = {}
    with torch.no_grad(), gate_values(model, adapter) as record:
        for text in texts:
            record.clear()
            model(input_ids=torch.tensor([list(text)], device=model.device), use_cache=False)
            for place, found in record.decisions():
                gates, threshold = _rows(found.gates), found.threshold
                _check_finite(place, gates)
                flat = Decisions(gates, None if threshold is None else _rows(threshold)[:, 0])
                seen.setdefault(place, []).append(flat)
            progress()
    return {place: joined(parts) for place, parts in seen.items()}


def joined(parts: Sequence[Decisions]) -> Decisions:
    """The decisions of one router on several texts as one."""
    thresholds = [part.threshold for part in parts if part.threshold is not None]
    return Decisions(torch.cat([part.gates for part in parts]), torch.cat(thresholds) if thresholds else None)


def _check_finite(place: Place, gates: Tensor) -> None:
    if not gates.isfinite().all():
        whose = f"block {place.block}" if place.site is None else f"the copies of {place.site} in block {place.block}"
        raise ValueError(
            f"the router of {whose} puts out gates that are not finite: the adapter is damaged, or the model's dtype "
            "overflows (try --dtype float32)"
        )


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).float().cpu()
