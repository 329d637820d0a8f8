"""Watching gates from outside: `gate_values` records what the routers decided, by hooks that come off again.

Nothing is counted inside a forward: activation checkpointing runs every block twice, and what backward recomputes
must not be recorded a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moa import _hosts
from moa.adapters.block import Mixture
from moa.adapters.experts.base import column_position
from moa.adapters.gating import Gates
from moa.adapters.members import active_adapters, experts_of, mixtures_of
from moa.adapters.routers import RouterLayer

DEAD = 0.01
"""An expert counts as dead in a block if it is active on fewer tokens than this share, or its mean gate is lower."""


class Place(NamedTuple):
    """Which router: a block's own (``site`` None), or the one over the copies of the expert at ``site``."""

    block: int
    site: str | None


class Decisions(NamedTuple):
    """What one router decided, ``gates`` (..., columns) and ``threshold`` (..., 1) or None for rules without one."""

    gates: Tensor
    threshold: Tensor | None


class GateRecord:
    """What one or more forwards decided.

    Forwards that follow each other on the same batch rows, as in cached generation, are joined along tokens.

    Attributes:
        experts: names of the gate columns, in the order of the columns; of all blocks, if blocks differ.
        columns: block -> names of that block's columns.
        gates: block -> (batch, tokens, columns), after masking.
        thresholds: block -> (batch, tokens, 1), or None for gatings without a threshold.
        routes: block -> site -> (batch, tokens, copies), for experts with several copies.
    """

    def __init__(self) -> None:
        self.experts: list[str] = []
        self.columns: dict[int, list[str]] = {}
        self.gates: dict[int, Tensor] = {}
        self.thresholds: dict[int, Tensor | None] = {}
        self.routes: dict[int, dict[str, Tensor]] = {}

    def decisions(self) -> Iterator[tuple[Place, Decisions]]:
        """All of it, router by router; tensors (batch, tokens, columns), where copies are columns too."""
        for block, gates in self.gates.items():
            yield Place(block, None), Decisions(gates, self.thresholds[block])
        for block, sites in self.routes.items():
            for site, routes in sites.items():
                yield Place(block, site), Decisions(routes, None)

    def columns_of(self, place: Place) -> list[str]:
        """Names of what a router decides about: experts, or copies as ``"q/0"``, ``"q/1"``."""
        if place.site is None:
            return self.columns[place.block]
        return copy_names(place.site, self.routes[place.block][place.site].shape[-1])

    def clear(self) -> None:
        """Forget what was recorded, to start on another batch."""
        self.gates.clear()
        self.thresholds.clear()
        self.routes.clear()

    def watch(self, mixture: Mixture, adapter: str) -> Any:
        """Start recording a block's router; returns the hook's handle."""
        columns = mixture.columns[adapter]
        self.columns[mixture.index] = columns
        self.experts += [name for name in columns if name not in self.experts]

        def record(router: nn.Module, args: tuple[Any, ...], gates: Gates) -> None:
            if args[1] != adapter or _hosts.in_backward():
                return
            weights = gates.weights.detach()[..., mixture.column_outputs[adapter]]
            self.gates[mixture.index] = _join(self.gates.get(mixture.index), weights)
            self.thresholds[mixture.index] = (
                None if gates.threshold is None else _join(self.thresholds.get(mixture.index), gates.threshold.detach())
            )

        return mixture.register_forward_hook(record)

    def watch_copies(self, copies: RouterLayer, adapter: str, block: int, site: str) -> Any:
        """Start recording the router over an expert's copies; returns the hook's handle."""

        def record(router: nn.Module, args: tuple[Any, ...], gates: Gates) -> None:
            if args[1] == adapter and not _hosts.in_backward():
                routes = self.routes.setdefault(block, {})
                routes[site] = _join(routes.get(site), gates.weights.detach())

        return copies.register_forward_hook(record)


def _join(before: Tensor | None, now: Tensor) -> Tensor:
    if before is None:
        return now
    if before.shape[0] != now.shape[0]:
        raise ValueError(
            f"gate_values: a batch of {now.shape[0]} rows follows one of {before.shape[0]}; call .clear() in between "
            "or use one gate_values() per batch"
        )
    return torch.cat([before, now], dim=1)


@contextmanager
def gate_values(model: nn.Module, adapter: str | None = None) -> Iterator[GateRecord]:
    """Record every block's gates of the forwards inside.

    Args:
        model: a model with a Mixture of Adapters.
        adapter: whose gates; None: those of the one active adapter.

    Yields:
        A `GateRecord`, filled as forwards run; tensors are detached and stay on their device.

    Raises:
        ValueError: the model has no such mixture, or several are active and none was named.

    Example:
        >>> with moa.gate_values(model) as record:
        ...     model(**batch)
        >>> record.gates[0].mean(dim=(0, 1))  # mean gate of every expert of the first block
    """
    mixtures = mixtures_of(model)
    if not mixtures:
        raise ValueError(f"gate_values: {type(model).__name__} has no Mixture of Adapters")
    adapter = adapter or _only_adapter(model)
    if adapter not in list(mixtures[0].auxiliary):
        raise ValueError(f"gate_values: there is no adapter {adapter!r}; there are {[*mixtures[0].auxiliary]}")
    record = GateRecord()
    handles = [record.watch(mixture, adapter) for mixture in mixtures if adapter in mixture.router]
    for mixture in mixtures:
        for expert in experts_of(mixture, adapter):
            copies = expert.router_over_copies(adapter)
            if copies is not None:
                handles.append(record.watch_copies(copies, adapter, mixture.index, expert.site))
    record.experts.sort(key=column_position)
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _only_adapter(model: nn.Module) -> str:
    names = active_adapters(model)
    if len(names) != 1:
        raise ValueError(f"gate_values: name one adapter, active are {names}")
    return names[0]


def copy_names(site: str, copies: int) -> list[str]:
    """What the copies of an expert are called."""
    return [f"{site}/{number}" for number in range(copies)]


def is_dead(gate: float, active: float) -> bool:
    """Whether an expert hardly acts, given its mean gate and the share of tokens it is active on."""
    return gate < DEAD or active < DEAD
