"""Attention of many queries at once under a span: cost in proportion to what is seen, not to the text.

Keys are *columns* with positions, in the text's order: what a ring still holds, then the new tokens. Queries are the
last columns. They are worked off in chunks, each of which reads the sink and its own window and nothing else.

Without padding, where every column is follows from three numbers (`Run`), and nothing is asked of the accelerator; the
chunks of a window look alike, so that their mask is made once for all layers of a forward. With padding, positions are
tensors (`Places`), and what a chunk needs has to be looked up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moa.spans.layout import HIDDEN, Sight


class Kernel(Protocol):
    """Attention of some heads.

    Attributes:
        dtype: of its queries.
    """

    dtype: torch.dtype

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
Masks = dict[tuple[object, ...], Tensor]  # prepared masks of chunks that look alike, kept for one forward


class Chunk(NamedTuple):
    """Some queries, and the keys that they may see.

    Attributes:
        queries: of the new columns.
        seen: columns, at most two runs of them.
        alike: chunks of one span with the same value have the same mask; None if that is not known.
    """

    queries: slice
    seen: list[slice]
    alike: tuple[int, ...] | None


@dataclass(frozen=True)
class Run:
    """Columns of a text without padding: the first tokens, a gap, and the latest ones, the new ones among them.

    Attributes:
        first: tokens from the beginning on that are columns.
        start: position of the column after these; ``first`` if there is no gap.
        count: tokens before the new ones.
        new: new tokens.
        device: of the keys.
    """

    first: int
    start: int
    count: int
    new: int
    device: torch.device

    @property
    def whole(self) -> bool:
        """Whether the new tokens are all there is."""
        return self.count == 0

    def chunks(self, begin: int, size: int, span: int, sight: Sight) -> Iterator[Chunk]:
        """Chunks of ``size`` queries from the new column ``begin`` on."""
        sinks = self._column(min(sight.sink, self.count + self.new))
        for first in range(begin, self.new, size):
            end = min(first + size, self.new)
            lead = self.count + first
            oldest = max(sight.oldest(lead, span), 0)
            window, stop = self._column(oldest), self._column(self.count + end - 1) + 1
            if sinks > window:
                yield Chunk(slice(first, end), [slice(0, stop)], None)
                continue
            lag, phase = lead - max(oldest, self.start), lead % sight.block if sight.blockwise else 0
            alike = (end - first, sinks, stop - window, lag, phase) if lead >= sight.sink else None
            yield Chunk(slice(first, end), [slice(0, sinks), slice(window, stop)], alike)

    def _column(self, position: int) -> int:
        """The first column at ``position`` or later."""
        return position if position < self.first else self.first + max(position - self.start, 0)

    def queries(self, part: slice) -> Tensor:
        """Positions of new tokens, ``(1, n)``."""
        return torch.arange(self.count + part.start, self.count + part.stop, device=self.device)[None]

    def keys(self, seen: list[slice]) -> Tensor:
        """Positions of columns, ``(1, n)``."""
        shift = self.start - self.first
        columns = torch.cat([torch.arange(part.start, part.stop, device=self.device) for part in seen])
        return torch.where(columns < self.first, columns, columns + shift)[None]


@dataclass(frozen=True)
class Places:
    """Columns with a position each.

    Attributes:
        at: of the queries, ``(1 or batch, q)``.
        columns: of the keys, ``(1 or batch, k)``, `HIDDEN` for padding.
    """

    at: Tensor
    columns: Tensor

    @property
    def new(self) -> int:
        return self.at.shape[1]

    @property
    def whole(self) -> bool:
        """Never taken for granted: padding may be among the columns."""
        return False

    def chunks(self, begin: int, size: int, span: int, sight: Sight) -> Iterator[Chunk]:
        """Chunks of ``size`` queries from the new column ``begin`` on."""
        old = self.columns.shape[1] - self.new
        sinks = _sink_columns(self.columns, sight.sink)
        for first in range(begin, self.new, size):
            end = min(first + size, self.new)
            queries = self.at[:, first:end]
            oldest = torch.where(queries < 0, HIDDEN, sight.oldest(queries, span)).amin(1, keepdim=True)
            past = self.columns[:, : old + end]
            needed = ((past >= oldest) & (past < HIDDEN)).any(0)
            window = slice(int(needed.int().argmax()) if needed.any() else old + first, old + end)
            apart = sinks.stop <= window.start
            seen = [sinks, window] if apart else [slice(min(sinks.start, window.start), window.stop)]
            yield Chunk(slice(first, end), seen, None)

    def queries(self, part: slice) -> Tensor:
        """Positions of new columns."""
        return self.at[:, part]

    def keys(self, seen: list[slice]) -> Tensor:
        """Positions of columns."""
        return _take(self.columns, seen)


def attend(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text: Run | Places,
    span: int,
    sight: Sight,
    masks: Masks | None = None,
) -> Tensor:
    """Attention of the last columns' queries under one span.

    Args:
        kernel: computes attention.
        query: ``(batch, query heads, q, head_dim)``.
        key: ``(batch, KV heads, k, head_dim)``, ``k >= q``.
        value: likewise.
        text: where the columns are.
        span: tokens, sink included.
        sight: what is seen.
        masks: of this forward; what is missing is added.
    """
    masks = {} if masks is None else masks
    shared = query.shape[1] // key.shape[1]
    parts, start = [], 0
    if text.whole:  # the first rows see everything before them
        start = min(span, text.new)
        parts.append(kernel(query[:, :, :start], key[:, :, :start], value[:, :, :start], None, causal=True))
    size = min(max(span // 16, SMALLEST), LARGEST)
    for chunk in text.chunks(start, size, span, sight):
        kind = None if chunk.alike is None else (query.device, kernel.dtype, span, shared, *chunk.alike)
        mask = masks.get(kind) if kind is not None else None
        if mask is None:
            seen = sight.visible(text.queries(chunk.queries), text.keys(chunk.seen), span)
            mask = kernel.prepare(seen[:, None], shared)
            if kind is not None:
                masks[kind] = mask
        rows = query[:, :, chunk.queries]
        parts.append(kernel(rows, _take(key, chunk.seen), _take(value, chunk.seen), mask))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _sink_columns(columns: Tensor, sink: int) -> slice:
    """The columns among which the first tokens of all rows are."""
    found = (columns < sink).any(0).nonzero()[:, 0]
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)


def _take(tensor: Tensor, seen: list[slice]) -> Tensor:
    """Slices along the columns: the second dimension of positions ``(n, k)``, the third of keys ``(b, h, k, d)``."""
    dim = 1 if tensor.ndim == 2 else 2
    parts = [tensor.narrow(dim, part.start, part.stop - part.start) for part in seen]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
