"""What a search optimises: losses and costs of every rule for every head, and the limits on a plan.

A *layout* says which blocks a rule keeps at a length. `native` is the layout of `SpanPlan`'s own span function, so that
search, mask, cache and density mean the same thing. `reference` is the layout of the official code's search, where the
sink comes on top of the span; it is here to compare with official numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moa.spans.rule import Rule, span

Array = NDArray[np.float64]
Choice = NDArray[np.int64]


class Band(NamedTuple):
    """Kept blocks of a row: the first ``sinks`` columns, and ``window`` blocks up to the diagonal and including it."""

    sinks: int
    window: int

    def share(self, blocks: int) -> float:
        """Kept share of the last row's blocks: what the KV cache holds."""
        return min(self.sinks + self.window, blocks) / blocks


Layout = Callable[[Rule, int], Band]


def native(sink: int, block: int) -> Layout:
    """The layout of `moa.spans.rule.span`: the sink is part of the span."""

    def band(rule: Rule, length: int) -> Band:
        kept = span(rule.alpha, rule.beta, length, sink=sink, block=block)
        return Band(sink // block, max(-(-(kept - sink) // block), 1))

    return band


def reference(block: int) -> Layout:
    """The official search's layout (``elastic_block_sparse.py:75-98``): one sink block on top of the span."""

    def band(rule: Rule, length: int) -> Band:
        return Band(1, max(int(rule.alpha // block + rule.beta * (length // block)), 1))

    return band


@dataclass(frozen=True)
class Program:
    """A multi-objective choice of one rule per head.

    Attributes:
        rules: the rules to choose from.
        lengths: profiled lengths in tokens; one objective each.
        constrained: lengths with density bounds.
        losses: (lengths, layers, KV heads, rules), influence that a rule drops; never negative. The last profiled
            length speaks for longer ones, too, if the program was made so.
        shares: (constrained, rules), share of the dense KV cache that a rule keeps.
        floor: (constrained,), least mean share.
        ceiling: (constrained,), greatest mean share.
        limit: most distinct rules per layer.
    """

    rules: tuple[Rule, ...]
    lengths: tuple[int, ...]
    constrained: tuple[int, ...]
    losses: Array
    shares: Array
    floor: Array
    ceiling: Array
    limit: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, KV heads, rules."""
        layers, heads, count = self.losses.shape[1:]
        return layers, heads, count

    def loss(self, choice: Choice) -> Array:
        """(lengths,) loss of a (layers, KV heads) choice of rule numbers."""
        return np.take_along_axis(self.losses, choice[None, :, :, None], 3).sum((1, 2, 3))

    def density(self, choice: Choice) -> Array:
        """(constrained,) mean share of a (layers, KV heads) choice of rule numbers."""
        return self.shares[:, choice].mean((1, 2))

    def broken(self, choice: Choice) -> str | None:
        """The first constraint that a choice breaks, in words; None if it keeps all."""
        for length, density, low, high in zip(
            self.constrained, self.density(choice), self.floor, self.ceiling, strict=True
        ):
            if not low - 1e-9 <= density <= high + 1e-9:
                return f"density {density:.4f} at length {length} is outside of [{low:.4f}, {high:.4f}]"
        for layer, row in enumerate(choice):
            if len(set(row.tolist())) > self.limit:
                return f"layer {layer} has {len(set(row.tolist()))} rules, more than {self.limit}"
        return None


def program(
    influences: Mapping[int, Tensor],
    rules: Sequence[Rule],
    layout: Layout,
    density: Mapping[int, float],
    *,
    block: int = 64,
    floor: float = 0.9,
    limit: int = 2,
    longer: Sequence[int] = (),
) -> Program:
    """Losses and costs of every rule.

    At lengths that nobody has profiled, influence is taken to lie as at the longest profiled one, stretched: a head
    that fetches facts from anywhere goes on doing so. Without that a span that is fixed costs nothing beyond, and a
    plan that is right at 2048 tokens forgets at 4096.

    Args:
        influences: length to (layers, KV heads, blocks, blocks) influence, zero above the diagonal.
        rules: the rules to choose from.
        layout: which blocks a rule keeps.
        density: length to greatest mean KV density; names at least the lengths that bound a plan.
        block: tokens per block.
        floor: least mean density, as a share of the greatest.
        limit: most distinct rules per layer.
        longer: lengths above the profiled ones at which a rule's loss counts, too, beside that at the longest of these.

    Raises:
        ValueError: shapes that do not belong together, numbers that are not finite, or a bound outside of (0, 1].
    """
    _check(influences, rules, density, block, floor, limit)
    lengths, constrained = tuple(sorted(influences)), tuple(sorted(density))
    maps = {length: influences[length].double().numpy() for length in lengths}
    losses = [dropped(maps[length], [layout(rule, length) for rule in rules]) for length in lengths]
    last = lengths[-1]
    beyond = [dropped(maps[last], [layout(rule, n) for rule in rules], last / n) for n in longer if n > last]
    losses[-1] = np.mean([losses[-1], *beyond], 0)
    shares = [[layout(rule, length).share(length // block) for rule in rules] for length in constrained]
    ceiling = np.array([density[length] for length in constrained])
    return Program(
        tuple(rules), lengths, constrained, np.stack(losses), np.array(shares), floor * ceiling, ceiling, limit
    )


def dropped(influence: Array, bands: Sequence[Band], share: float = 1.0) -> Array:
    """(layers, KV heads, bands): total influence outside of each band.

    Args:
        influence: (layers, KV heads, blocks, blocks).
        bands: which blocks are kept; all with as many sink blocks as the first.
        share: blocks of the influence for each block of the bands' text; below 1 for a longer text than the profiled
            one, whose windows then end within blocks.
    """
    blocks, sinks = influence.shape[-1], bands[0].sinks
    beyond = influence.copy()
    beyond[..., :sinks] = 0
    distances = [np.trace(beyond, offset=-distance, axis1=-2, axis2=-1) for distance in range(blocks)]
    # What lies at a distance of w blocks or more, for every w.
    tail = np.cumsum(np.stack([*distances, np.zeros_like(distances[0])], -1)[..., ::-1], -1)[..., ::-1]
    edges = np.array([min(band.window * share, blocks) for band in bands])
    whole = np.floor(edges).astype(int)
    part = edges - whole
    return tail[..., whole] * (1 - part) + tail[..., np.minimum(whole + 1, blocks)] * part


def _check(
    influences: Mapping[int, Tensor],
    rules: Sequence[Rule],
    density: Mapping[int, float],
    block: int,
    floor: float,
    limit: int,
) -> None:
    if not influences or not rules or not density:
        raise ValueError("a search needs influence at one length or more, rules, and a density bound")
    for length in [*influences, *density]:
        if length < block or length % block:
            raise ValueError(f"length {length} is not a multiple of the block of {block} tokens")
    heads = {tuple(tensor.shape[:2]) for tensor in influences.values() if tensor.dim() == 4}
    for length, tensor in influences.items():
        side = length // block
        if tensor.dim() != 4 or tensor.shape[2:] != (side, side) or len(heads) != 1:
            raise ValueError(
                f"influence at length {length} has shape {tuple(tensor.shape)}, but must be (layers, KV heads, {side}, "
                f"{side}) with the same layers and heads at every length"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"influence at length {length} holds numbers that are not finite")
    for length, bound in density.items():
        if not 0 < bound <= 1:
            raise ValueError(f"density {bound} at length {length} is outside of (0, 1]")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor={floor} is outside of [0, 1]")
    if not 1 <= limit <= 3:
        raise ValueError(f"limit={limit} rules per layer is not one of [1, 2, 3]")
