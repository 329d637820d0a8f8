"""Attention of many queries at once under a span: cost in proportion to what is seen, not to the text.

Keys are *columns* with positions, in the text's order: what a ring still holds, then the new tokens. Queries are the
last columns. They are worked off in chunks, each of which reads the sink and its own window and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from moa.spans.layout import HIDDEN, Sight


class Kernel(Protocol):
    """Attention of some heads."""

    def prepare(self, mask: Tensor, shared: int) -> Tensor:
        """What `__call__` wants for a mask.

        Args:
            mask: ``(batch or 1, 1, q, k)``, true where a query sees a key.
            shared: query heads of a KV head.
        """
        ...

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        """Outputs ``(batch, query heads, q, value head_dim)``.

        Args:
            query: ``(batch, query heads, q, head_dim)``.
            key: ``(batch, KV heads, k, head_dim)``.
            value: ``(batch, KV heads, k, value head_dim)``.
            mask: a prepared one; None: all is seen.
            causal: instead of a mask; ``q == k``.
        """
        ...


SMALLEST, LARGEST = 128, 512  # queries of a chunk: a sixteenth of the span within these


def attend(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    at: Tensor,
    columns: Tensor,
    span: int,
    sight: Sight,
) -> Tensor:
    """Attention of the last columns' queries under one span.

    Args:
        kernel: computes attention.
        query: ``(batch, query heads, q, head_dim)``.
        key: ``(batch, KV heads, k, head_dim)``, ``k >= q``.
        value: likewise.
        at: positions of the queries, ``(1 or batch, q)``.
        columns: positions of the keys, ``(1 or batch, k)``, `HIDDEN` for padding.
        span: tokens, sink included.
        sight: what is seen.
    """
    new, old = query.shape[2], key.shape[2] - query.shape[2]
    parts, start = [], 0
    if old == 0 and at is columns:  # no padding, no past: the first rows see everything before them
        start = min(span, new)
        parts.append(kernel(query[:, :, :start], key[:, :, :start], value[:, :, :start], None, causal=True))
    prepare = partial(kernel.prepare, shared=query.shape[1] // key.shape[1])
    for first, end, seen, mask in _chunks(prepare, at, columns, start, old, span, sight):
        parts.append(kernel(query[:, :, first:end], _take(key, seen), _take(value, seen), mask))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _chunks(
    prepare: Callable[[Tensor], Tensor], at: Tensor, columns: Tensor, start: int, old: int, span: int, sight: Sight
) -> Iterator[tuple[int, int, list[slice], Tensor]]:
    """Queries ``first:end``, the columns they need, and the prepared mask between them."""
    size = min(max(span // 16, SMALLEST), LARGEST)
    sinks = _sink_columns(columns, sight.sink)
    masks: dict[tuple[int, ...], Tensor] = {}
    for first in range(start, at.shape[1], size):
        end = min(first + size, at.shape[1])
        queries = at[:, first:end]
        oldest = torch.where(queries < 0, HIDDEN, sight.oldest(queries, span)).amin(1, keepdim=True)
        past = columns[:, : old + end]
        needed = ((past >= oldest) & (past < HIDDEN)).any(0)
        window = slice(int(needed.int().argmax()) if needed.any() else old + first, old + end)
        apart = sinks.stop <= window.start
        seen = [sinks, window] if apart else [slice(min(sinks.start, window.start), window.stop)]
        keys = _take(columns, seen)
        # Without padding in between, chunks past the sink look alike but for where they are.
        lead = int(queries[0, 0])
        alike = len(columns) == 1 and apart and lead >= sight.sink
        alike = alike and _gapless(queries) and _gapless(columns[:, window])
        phase = lead % sight.block if sight.blockwise else 0
        place = (end - first, keys.shape[-1], lead - int(columns[0, window.start]), phase)
        mask = masks.get(place) if alike else None
        if mask is None:
            mask = prepare(sight.visible(queries, keys, span)[:, None])
            if alike:
                masks = {place: mask}
        yield first, end, seen, mask


def _gapless(places: Tensor) -> bool:
    """Whether positions ``(1, n)`` of a text have no padding among them."""
    return int(places[0, -1] - places[0, 0]) == places.shape[1] - 1


def _sink_columns(columns: Tensor, sink: int) -> slice:
    """The columns among which the first tokens of all rows are."""
    found = (columns < sink).any(0).nonzero()[:, 0]
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)


def _take(tensor: Tensor, seen: list[slice]) -> Tensor:
    """Slices along the columns: the second dimension of positions ``(n, k)``, the third of keys ``(b, h, k, d)``."""
    dim = 1 if tensor.ndim == 2 else 2
    parts = [tensor.narrow(dim, part.start, part.stop - part.start) for part in seen]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
