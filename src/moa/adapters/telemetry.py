"""Watching gates from outside: `gate_values` records what the routers decided, by hooks that come off again.

Nothing is counted inside a forward: activation checkpointing runs every block twice, and what backward recomputes
must not be recorded a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moa import _hosts
from moa.adapters.block import Mixture
from moa.adapters.experts import ExpertLayer
from moa.adapters.gating import Gates
from moa.adapters.placement import column_position
from moa.adapters.routers import RouterLayer

DEAD = 0.01
"""An expert counts as dead in a block if it is active on fewer tokens than this share, or its mean gate is lower."""


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
    mixtures = [module for module in model.modules() if isinstance(module, Mixture)]
    if not mixtures:
        raise ValueError(f"gate_values: {type(model).__name__} has no Mixture of Adapters")
    adapter = adapter or _only_adapter(mixtures)
    record = GateRecord()
    handles = [record.watch(mixture, adapter) for mixture in mixtures if adapter in mixture.router]
    for mixture in mixtures:
        for expert in (m for m in mixture.host.modules() if isinstance(m, ExpertLayer)):
            copies = _hosts.children(expert).get("mixture_copies")
            if copies is not None:
                handles.append(record.watch_copies(copies, adapter, mixture.index, expert.site))
    record.experts.sort(key=column_position)
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _only_adapter(mixtures: list[Mixture]) -> str:
    names = sorted({name for mixture in mixtures for name in mixture.active_adapters})
    if len(names) != 1:
        raise ValueError(f"gate_values: name one adapter, active are {names}")
    return names[0]
