"""What every expert puts out before its gate, caught while the model runs.

An observer at the expert's own door is handed what the expert reads, and asks it for the update of each copy alone. No
kind of expert is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moa.adapters.block import Mixture
from moa.adapters.experts import ExpertLayer
from moa.adapters.members import experts_of


class Output(NamedTuple):
    """One expert's output on the tokens of a forward, ungated, in float32.

    Attributes:
        whole: (tokens, features), its copies mixed by their own router.
        copies: (copies, tokens, features), before that router; None for one copy.
    """

    whole: Tensor
    copies: Tensor | None


class Seen:
    """What one expert did in a forward.

    Attributes:
        copies: (copies, tokens, features), the output of each copy alone.
        route: (tokens, copies), how their own router mixes them; None for one copy.
    """

    def __init__(self) -> None:
        self.copies: Tensor | None = None
        self.route: Tensor | None = None

    @property
    def output(self) -> Output | None:
        """None for an expert that did not run."""
        if self.copies is None:
            return None
        if self.route is None:
            return Output(self.copies[0], None)
        return Output(torch.einsum("tc,ctf->tf", self.route, self.copies), self.copies)

    def clear(self) -> None:
        """Forget it, to watch another forward."""
        self.copies = self.route = None


@contextmanager
def outputs_of(mixture: Mixture, adapter: str) -> Iterator[dict[str, Seen]]:
    """Watch a block's experts in the forwards inside; by site, what the last one showed.

    Raises:
        ValueError: the model is split among processes, of which each would show its share of the features.
    """
    if mixture.split is not None:
        raise ValueError(
            "the base model is split by tensor parallelism: load it without tp_plan to measure what experts put out"
        )
    seen: dict[str, Seen] = {}
    with ExitStack() as stack:
        for layer in experts_of(mixture, adapter):
            notes = seen[layer.site] = Seen()
            stack.callback(_watch(layer, adapter, notes))
        yield seen


def _watch(layer: ExpertLayer, adapter: str, notes: Seen) -> Callable[[], Any]:
    """Let ``notes`` be taken; returns what ends it."""
    number = layer.number_of_copies(adapter)

    def observe(name: str, x: Tensor, y: Tensor) -> None:
        if name == adapter:
            with torch.no_grad():
                alone = [None] if number == 1 else torch.eye(number, dtype=x.dtype, device=x.device)
                parts = [_update(layer, adapter, x, y, weights) for weights in alone]
            notes.copies = torch.stack(parts)

    def routed(router: nn.Module, args: tuple[Any, ...], gates: Any) -> None:
        if args[1] == adapter:
            notes.route = _rows(gates.weights.detach())

    layer.observers.append(observe)
    router = layer.router_over_copies(adapter)
    handle = None if router is None else router.register_forward_hook(routed)

    def end() -> None:
        layer.observers.remove(observe)
        if handle is not None:
            handle.remove()

    return end


def _update(layer: ExpertLayer, adapter: str, x: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
    """One copy's update (tokens, features), given its weights (copies,) for all tokens."""
    if weights is not None:
        weights = weights.view(*(1,) * (y.dim() - 1), -1)
    return _rows(layer.update(adapter, x, y, weights).expand_as(y))


def _rows(values: Tensor) -> Tensor:
    return values.float().reshape(-1, values.shape[-1])
