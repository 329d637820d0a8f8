"""Attention of heads with the same span, under each host implementation that a plan can run on.

The cost of reading a prompt is in proportion to what is seen, not to the text: queries are worked off in chunks, each
of which reads the sink and its own window and nothing else. Where a chunk lies follows from shapes alone, so nothing is
asked of an accelerator; chunks that look alike share their mask, over all layers of a forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from moa import _hosts
from moa.spans.runtime.ring import Count, Ring
from moa.spans.runtime.visibility import Sight, TextMask

HOSTS = ("sdpa", "eager")
UNFUSED = ("softcap", "position_bias", "s_aux")  # what torch's fused attention cannot do
SMALLEST, LARGEST = 128, 512  # queries of a chunk: a sixteenth of the span within these


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


def kernel(
    module: nn.Module, host: str, dtype: torch.dtype, scaling: float | None, dropout: float, rest: dict[str, Any]
) -> Kernel:
    """The host's arithmetic on some heads of ``module``, whose queries have ``dtype``; ``rest`` is what else it gets.

    Raises:
        ValueError: the module asks for something that torch's fused attention cannot do.
    """
    if host == "sdpa":
        for name in UNFUSED:
            if rest.get(name) is not None:
                raise ValueError(
                    f"{type(module).__name__} has {name}: a span plan needs attn_implementation='eager' for it"
                )
        return Sdpa(dtype, scaling, dropout)
    function = _hosts.attention_function(module, host)
    return Eager(dtype, partial(function, module, scaling=scaling, dropout=dropout, **rest))


class Sdpa:
    """Torch's fused attention. Query heads of a KV head become more rows of it, so its keys are never repeated."""

    def __init__(self, dtype: torch.dtype, scaling: float | None, dropout: float) -> None:
        self.dtype = dtype
        self.settings: dict[str, Any] = {"scale": scaling, "dropout_p": dropout}

    def prepare(self, mask: Tensor, shared: int) -> Tensor:
        """Added to the scores, once for all calls that use it."""
        return _as_scores(mask, self.dtype).repeat(1, 1, shared, 1)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        batch, heads, new, _ = query.shape
        attend = functional.scaled_dot_product_attention
        if causal:
            return attend(query, key, value, is_causal=True, enable_gqa=heads > key.shape[1], **self.settings)
        if heads > key.shape[1]:
            query = query.reshape(batch, key.shape[1], heads // key.shape[1] * new, -1)
        return attend(query, key, value, mask, **self.settings).reshape(batch, heads, new, -1)


class Eager:
    """A modeling file's own attention, with everything special about it, such as soft-capped scores."""

    def __init__(self, dtype: torch.dtype, function: Callable[..., tuple[Tensor, Any]]) -> None:
        self.dtype, self.function = dtype, function

    def prepare(self, mask: Tensor, shared: int) -> Tensor:
        """Added to the scores; all heads share it."""
        return _as_scores(mask, self.dtype)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        if causal:
            pairs = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            mask = _as_scores(pairs.tril()[None, None], self.dtype)
        return self.function(query, key, value, mask)[0].transpose(1, 2)


@dataclass(frozen=True)
class Prompt:
    """Many new tokens of a text, every row's tokens first.

    Attributes:
        run: computes attention.
        sight: what is seen.
        count: tokens before.
        text: of this forward, which keeps masks.
    """

    run: Kernel
    sight: Sight
    count: Count
    text: TextMask

    def attend(self, query: Tensor, key: Tensor, value: Tensor, span: int, ring: Ring | None) -> Tensor:
        """Attention under one span to what a ring holds, and to each other.

        Args:
            query: ``(batch, query heads, n, head_dim)``.
            key: ``(batch, KV heads, n, head_dim)``.
            value: likewise.
            span: tokens, sink included.
            ring: what is kept of the tokens before; None: there are none.
        """
        new, parts, start = query.shape[2], [], 0
        if ring is None:  # the first rows see everything before them
            start = min(span, new)
            parts.append(self.run(query[:, :, :start], key[:, :, :start], value[:, :, :start], None, causal=True))
        size = min(max(span // 16, SMALLEST), LARGEST)
        for first in range(start, new, size):
            rows = slice(first, min(first + size, new))
            old, seen = self._seen(rows, span, ring)
            mask = self._mask(rows, old, seen, span, ring, query.shape[1] // key.shape[1], key.device)
            keys, values = ([tensor[:, :, part] for part in seen] for tensor in (key, value))
            if ring is not None:
                keys, values = [ring.keys[:, :, old], *keys], [ring.values[:, :, old], *values]
            parts.append(self.run(query[:, :, rows], _joined(keys), _joined(values), mask))
        return _joined(parts)

    def _seen(self, rows: slice, span: int, ring: Ring | None) -> tuple[slice, list[slice]]:
        """The keys that some queries may see: slots of the ring, and one or two runs of new columns."""
        near = rows.start + 1 - self.sight.width(span)
        held = 0
        if ring is not None:
            filled = ring.filled(self.count) if isinstance(self.count, int) else ring.span
            assert isinstance(filled, int)
            held = filled if near < 0 else min(filled, ring.sink)
        sinks = max(self.sight.sink - self.count, 0) if isinstance(self.count, int) else self.sight.sink
        return slice(0, held), [slice(0, rows.stop)] if near <= sinks else [slice(0, sinks), slice(near, rows.stop)]

    def _mask(
        self,
        rows: slice,
        old: slice,
        seen: list[slice],
        span: int,
        ring: Ring | None,
        shared: int,
        device: torch.device,
    ) -> Tensor:
        """The prepared mask of a chunk. Chunks with a gap behind the sink look alike, wherever they are."""
        phase = rows.start % self.sight.block if self.sight.blockwise else 0
        place = ("at", rows.start) if len(seen) == 1 else ("behind a gap", phase)

        def make() -> Tensor:
            start = self.count if isinstance(self.count, int) else self.count[:, None]
            queries, *keys = (
                start + torch.arange(part.start, part.stop, device=device)[None] for part in (rows, *seen)
            )
            if ring is not None:
                keys = [ring.places(self.count)[:, old].expand(len(queries), -1), *keys]
            return self.run.prepare(self.sight.visible(queries, _joined(keys, 1), span)[:, None], shared)

        kind = None if ring is None else ring.kind
        return self.text.once(
            ("prompt", self.run.dtype, device, kind, span, shared, rows.stop - rows.start, place), make
        )


def _joined(parts: list[Tensor], dim: int = 2) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _as_scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
