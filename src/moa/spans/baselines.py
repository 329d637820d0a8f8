"""Plans that a searched plan has to beat, at an equal budget of real KV bytes.

Contract: every builder returns a native plan per KV head whose cache at ``length`` tokens holds at most ``density`` of
the dense cache's keys and values, and less than one block per head fewer. Spans are whole blocks, so small densities of
short texts cannot be met; that is an error.

- `uniform_window`: the same share for every head, StreamingLLM's sink and window (arXiv 2309.17453).
- `two_class`: some heads see everything, the others sink and window (DuoAttention, arXiv 2410.10819). There the classes
  are learned; here the scores given decide.
- `layer_only`: heads of a layer share a span, layers differ by their scores (in the manner of PyramidKV,
  arXiv 2406.02069, whose layer budgets follow from depth alone).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moa.spans.plan import SpanPlan
from moa.spans.shape import ModelShape

__all__ = ["far_influence", "layer_only", "two_class", "uniform_window"]

SINK = BLOCK = 64


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


def uniform_window(model_or_config: Any, density: float, length: int) -> SpanPlan:
    """The same sink and window for every head.

    Args:
        model_or_config: of a decoder.
        density: share of the dense cache, above 0, at most 1.
        length: tokens at which the budget holds.
    """
    shape = ModelShape.of(model_or_config)
    blocks = _budget(shape, density, length) // (shape.layers * shape.kv_heads)
    return _plan([[blocks] * shape.kv_heads for _ in range(shape.layers)], length)


def two_class(model_or_config: Any, density: float, length: int, scores: Tensor) -> SpanPlan:
    """Full spans for the heads of the highest scores, an equal window for the rest.

    As many heads are full as leave the smallest possible span to the rest; what is left over widens their windows.

    Args:
        model_or_config: of a decoder.
        density: share of the dense cache, above 0, at most 1.
        length: tokens at which the budget holds.
        scores: (layers, KV heads), the larger the more a head needs its far context.
    """
    shape = ModelShape.of(model_or_config)
    heads = shape.layers * shape.kv_heads
    if scores.shape != (shape.layers, shape.kv_heads):
        raise ValueError(f"scores are {tuple(scores.shape)}, the model has {shape.layers} x {shape.kv_heads} KV heads")
    budget, whole, least = _budget(shape, density, length), _whole(length), _least()
    full = (budget - least * heads) // (whole - least)
    rest = (budget - full * whole) // max(heads - full, 1)
    chosen = set(scores.flatten().argsort(descending=True, stable=True)[:full].tolist())
    flat = [whole if head in chosen else min(rest, whole) for head in range(heads)]
    return _plan([flat[i : i + shape.kv_heads] for i in range(0, heads, shape.kv_heads)], length)


def layer_only(model_or_config: Any, density: float, length: int, scores: Tensor) -> SpanPlan:
    """One span per layer, in proportion to the layer's share of the scores as far as bounds allow.

    Args:
        model_or_config: of a decoder.
        density: share of the dense cache, above 0, at most 1.
        length: tokens at which the budget holds.
        scores: (layers, KV heads), not negative.
    """
    shape = ModelShape.of(model_or_config)
    whole, least = _whole(length), _least()
    wanted = scores.sum(1).clamp_min(1e-12).tolist()
    blocks = [least] * shape.layers
    # Block by block to the layer that is furthest below its share: exact and independent of rounding.
    for _ in range(_budget(shape, density, length) // shape.kv_heads - least * shape.layers):
        open_ = [layer for layer in range(shape.layers) if blocks[layer] < whole]
        if not open_:
            break
        blocks[min(open_, key=lambda layer: blocks[layer] / wanted[layer])] += 1
    return _plan([[n] * shape.kv_heads for n in blocks], length)


def _whole(length: int) -> int:
    return -(-length // BLOCK)


def _least() -> int:
    return (SINK + BLOCK) // BLOCK


def _budget(shape: ModelShape, density: float, length: int) -> int:
    """Blocks of all heads together."""
    heads = shape.layers * shape.kv_heads
    blocks = int(density * length * heads // BLOCK)
    if not 0 < density <= 1 or blocks < heads * _least():
        least = _least() * BLOCK
        raise ValueError(
            f"density={density} of {length} tokens is no budget: it must be at most 1 and leave {least} tokens per head"
        )
    return min(blocks, heads * _whole(length))


def _plan(blocks: list[list[int]], length: int) -> SpanPlan:
    """Elastic rules that give these blocks at this length; a full span stays full at every length."""
    whole = _whole(length)
    betas = [[1.0 if n == whole else n * BLOCK / length for n in row] for row in blocks]
    return SpanPlan([[0.0] * len(row) for row in blocks], betas, sink=SINK, block=BLOCK)
