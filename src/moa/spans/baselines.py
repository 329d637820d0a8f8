"""Plans that a searched plan has to beat, at an equal budget of real KV bytes.

Contract: every builder returns a native plan per KV head whose cache at ``length`` tokens holds at most ``density`` of
the dense cache's keys and values, and less than one block per head fewer. Spans are whole blocks, so small densities of
short texts cannot be met; that is an error.

- `uniform_window`: the same share for every head, StreamingLLM's sink and window (arXiv 2309.17453).
- `two_class`: some heads see everything, the others sink and window (DuoAttention, arXiv 2410.10819). There the classes
  are learned and the window is given; here influence decides on both.
- `layer_only`: heads of a layer share a span, layers differ by their scores (in the manner of PyramidKV,
  arXiv 2406.02069, whose layer budgets follow from depth alone).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moa.spans.model import ModelShape
from moa.spans.plan import SpanPlan

__all__ = ["far_influence", "layer_only", "two_class", "uniform_window"]

SINK = BLOCK = 64
Model = Any  # a model, its configuration or its `ModelShape`


def far_influence(influence: Tensor, window: int = 1) -> Tensor:
    """What a head would lose as a streaming head: influence outside the sink block and the latest blocks.

    Args:
        influence: (layers, KV heads, blocks, blocks), absolute.
        window: latest blocks that stay, the diagonal one included.

    Returns:
        (layers, KV heads) scores for `two_class` and `layer_only`.
    """
    blocks = torch.arange(influence.shape[-1])
    far = (blocks[None, :] >= 1) & (blocks[None, :] <= blocks[:, None] - window)
    return (influence * far).sum((-2, -1))


def uniform_window(model: Model, density: float, length: int, *, sink: int = SINK, block: int = BLOCK) -> SpanPlan:
    """The same sink and window for every head.

    Args:
        model: a decoder, its configuration or its shape.
        density: share of the dense cache, above 0, at most 1.
        length: tokens at which the budget holds.
        sink: first tokens that every head keeps.
        block: granularity, tokens.
    """
    room = _Room.of(model, density, length, sink, block)
    return room.plan([room.budget // room.heads] * room.heads)


def two_class(
    model: Model, density: float, length: int, influence: Tensor, *, sink: int = SINK, block: int = BLOCK
) -> SpanPlan:
    """Full spans for the heads that need their far context most, an equal window for the rest.

    The longer that window, the fewer heads can be full. Of all windows that leave a whole number of full heads, the one
    is taken that drops least influence. From scores alone that cannot be told: then as many heads are full as leave the
    smallest possible window to the rest. What is left over widens the windows.

    Args:
        model: a decoder, its configuration or its shape.
        density: share of the dense cache, above 0, at most 1.
        length: tokens at which the budget holds.
        influence: (layers, KV heads, blocks, blocks), not negative, of a text of any length; or scores
            (layers, KV heads), the larger the more a head needs its far context.
        sink: first tokens that every head keeps.
        block: granularity, tokens.
    """
    room = _Room.of(model, density, length, sink, block)
    if influence.shape[:2] != (room.shape.layers, room.shape.kv_heads) or influence.dim() not in (2, 4):
        raise ValueError(
            f"influence is {tuple(influence.shape)}, the model has {room.shape.layers} x {room.shape.kv_heads} KV heads"
        )
    chosen = min(_splits(room, influence), key=lambda split: split.dropped)
    rest = (room.budget - len(chosen.full) * room.whole) // max(room.heads - len(chosen.full), 1)
    return room.plan([room.whole if head in chosen.full else min(rest, room.whole) for head in range(room.heads)])


class _Split(NamedTuple):
    full: set[int]
    dropped: float


def _splits(room: _Room, influence: Tensor) -> Iterator[_Split]:
    """For every window of the rest that the budget allows: the heads that are full, and what the others drop."""
    for rest in range(room.least, room.whole):
        count = (room.budget - rest * room.heads) // (room.whole - rest)
        if count < 0 or (influence.dim() == 2 and rest > room.least):
            return
        scores = influence
        if influence.dim() == 4:  # a window of the rest, in blocks of the influence's own text
            window = (rest - room.sink // room.block) * influence.shape[-1] // room.whole
            scores = far_influence(influence, window=max(window, 1))
        order = scores.flatten().argsort(descending=True, stable=True)
        yield _Split(set(order[:count].tolist()), float(scores.flatten()[order[count:]].sum()))
    yield _Split(set(range(room.heads)) if room.budget >= room.heads * room.whole else set(), math.inf)


def layer_only(
    model: Model, density: float, length: int, scores: Tensor, *, sink: int = SINK, block: int = BLOCK
) -> SpanPlan:
    """One span per layer, in proportion to the layer's share of the scores as far as bounds allow.

    Args:
        model: a decoder, its configuration or its shape.
        density: share of the dense cache, above 0, at most 1.
        length: tokens at which the budget holds.
        scores: (layers, KV heads), not negative.
        sink: first tokens that every head keeps.
        block: granularity, tokens.
    """
    room = _Room.of(model, density, length, sink, block)
    shape = room.shape
    wanted = scores.sum(1).clamp_min(1e-12).tolist()
    blocks = [room.least] * shape.layers
    # Block by block to the layer that is furthest below its share: exact and independent of rounding.
    for _ in range(room.budget // shape.kv_heads - room.least * shape.layers):
        open_ = [layer for layer in range(shape.layers) if blocks[layer] < room.whole]
        if not open_:
            break
        blocks[min(open_, key=lambda layer: blocks[layer] / wanted[layer])] += 1
    return room.plan([n for n in blocks for _ in range(shape.kv_heads)])


@dataclass(frozen=True)
class _Room:
    """What a budget leaves to the heads of a model, in blocks.

    Attributes:
        shape: of the model.
        length: tokens.
        sink: tokens.
        block: tokens.
        budget: blocks of all heads together.
    """

    shape: ModelShape
    length: int
    sink: int
    block: int
    budget: int

    @classmethod
    def of(cls, model: Model, density: float, length: int, sink: int, block: int) -> _Room:
        shape = model if isinstance(model, ModelShape) else ModelShape.of(model)
        heads, least = shape.layers * shape.kv_heads, (sink + block) // block
        blocks = int(density * length * heads // block)
        if not 0 < density <= 1 or blocks < heads * least:
            raise ValueError(
                f"density={density} of {length} tokens is no budget: it must be at most 1 and leave {least * block} "
                "tokens per head"
            )
        return cls(shape, length, sink, block, min(blocks, heads * -(-length // block)))

    @property
    def heads(self) -> int:
        return self.shape.layers * self.shape.kv_heads

    @property
    def whole(self) -> int:
        """Blocks of a full span."""
        return -(-self.length // self.block)

    @property
    def least(self) -> int:
        """Blocks of the shortest span."""
        return (self.sink + self.block) // self.block

    def plan(self, blocks: list[int]) -> SpanPlan:
        """Elastic rules that give every head its blocks at this length; a full span stays full at every length."""
        betas = [1.0 if n == self.whole else n * self.block / self.length for n in blocks]
        width = self.shape.kv_heads
        rows = [betas[i : i + width] for i in range(0, self.heads, width)]
        return SpanPlan([[0.0] * width for _ in rows], rows, sink=self.sink, block=self.block)
