"""The cache layer of a span plan: a ring per group of KV heads with the same span, whose bytes are the plan's.

A layer whose heads are all dense keeps a plain buffer that grows, in the text's own columns, so that its attention is
the host's, bit for bit. Every other layer hands out the new keys only; `moa.spans.runtime.attention` reads the rings.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from moa.spans.layout import Sight, positions
from moa.spans.runtime.heads import groups, heads_of, views_of
from moa.spans.runtime.ring import Count, Ring
from moa.spans.runtime.schedule import Schedule, Spans

NOT_CROPPABLE = (
    "a cache under a span plan cannot be cropped, so assisted and speculative decoding cannot use it; decode without "
    "an assistant, or without the plan"
)


class Handover(threading.local):
    """What a cache tells the attention function that follows it, apart for every thread.

    Attributes:
        layer: the layer that took keys last; None once attention has taken it from here.
    """

    layer: SpanLayer | None = None


class Owner(Protocol):
    """The application of a plan to a model, as far as a cache knows it.

    Attributes:
        active: whether the plan is applied.
        spans: the plan's, on the model's heads.
        length: the ``N`` that the application was told, 0 if none.
        handover: from a layer that took keys to the attention function that follows.
    """

    active: bool
    spans: Spans
    sight: Sight
    length: int
    handover: Handover


class SpanLayer(CacheLayerMixin):
    """Keys and values of one attention layer under a plan.

    Args:
        index: of the layer.
        schedule: shared by the layers of a cache.
        owner: the application of the plan that this cache belongs to; it is told of every update.

    Attributes:
        columns: columns of the text so far, padding included.
        count: tokens of every row, without padding.
        keys: ``(batch, slots of all heads, head_dim)``, one ring after another; while the layer is plain ``(batch,
            heads, reserved columns, head_dim)``. Likewise ``values``.
        rings: one for each span, or none while the layer is plain.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, index: int, schedule: Schedule, owner: Owner) -> None:
        super().__init__()
        self.keys: Tensor | None
        self.values: Tensor | None
        self.index, self.schedule, self.owner = index, schedule, owner
        self.columns, self.reserved = 0, 0
        self.count: Count = 0
        self.rings: list[Ring] = []
        self.padding: Tensor | None = None  # (batch, columns) of a plain layer, true for tokens; None: no padding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is laid out before the first update: the spans follow from its length."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values ``(batch, KV heads, n, head_dim)``; a plain layer returns all, others only the new.

        Raises:
            RuntimeError: no plan is applied to the model any more; only a plan's attention can read this cache.
        """
        if not self.owner.active:
            raise RuntimeError(
                "this cache was filled under a span plan that is no longer applied; apply it again, or "
                "start with a new cache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        self.schedule.extend(self.columns + new, new)
        self._fit(key_states, value_states)
        self.owner.handover.layer = self
        if self.rings:
            return key_states, value_states
        return self._append(key_states, value_states)

    def _fit(self, keys: Tensor, values: Tensor) -> None:
        """Make the storage that the schedule asks for now."""
        spans, sink = self.schedule.of(self.index), self.schedule.spans.plan.sink
        if not self.rings and min(spans) == self.schedule.length:
            return
        if not self.rings:
            self._move_in(groups(spans), keys, values, sink)
        elif any(spans[head] != ring.span for ring in self.rings for head in ring.heads):
            self._grow(spans, keys, values, sink)

    def _move_in(self, parts: dict[tuple[int, ...], int], keys: Tensor, values: Tensor, sink: int) -> None:
        """From a plain buffer, or nothing, into rings."""
        old_keys, old_values, padding = self.keys, self.values, self.padding
        self.rings, self.padding = self._lay_out(parts, keys, values, sink), None
        if old_keys is None or old_values is None:
            return
        for ring in self.rings:
            heads = list(ring.heads)
            keys, values = old_keys[:, heads, : self.columns], old_values[:, heads, : self.columns]
            if isinstance(self.count, int):
                ring.store_run(keys, values, 0, self.count)
            else:
                ring.store(keys, values, positions(0, self.columns, padding, self.device)[1], self.count)

    def _grow(self, spans: Sequence[int], keys: Tensor, values: Tensor, sink: int) -> None:
        """Into longer rings; heads that had the same span may part."""
        sources = [(heads, span, ring) for ring in self.rings for heads, span in groups(spans, ring.heads).items()]
        if self.columns > min(ring.span for ring in self.rings):
            self.schedule.warn_once(self.columns)
        self.rings = self._lay_out({heads: span for heads, span, _ in sources}, keys, values, sink)
        for ring, (_, _, source) in zip(self.rings, sources, strict=True):
            ring.take_over(source, self.count)

    def _lay_out(self, parts: dict[tuple[int, ...], int], keys: Tensor, values: Tensor, sink: int) -> list[Ring]:
        """Empty rings, one after another in one buffer ``(batch, slots of all heads, head_dim)``."""
        slots = sum(len(heads) * span for heads, span in parts.items())
        self.keys = keys.new_zeros(keys.shape[0], slots, keys.shape[-1])
        self.values = values.new_zeros(values.shape[0], slots, values.shape[-1])
        buffers = zip(views_of(self.keys, parts), views_of(self.values, parts), strict=True)
        return [Ring(heads, span, sink, *pair) for (heads, span), pair in zip(parts.items(), buffers, strict=True)]

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append to the plain buffer, and return all of it."""
        end = self.columns + keys.shape[-2]
        if end > self.reserved:
            self.reserved = self.schedule.length if end <= self.schedule.length else end
            self.keys = _longer(self.keys, keys, self.columns, self.reserved)
            self.values = _longer(self.values, values, self.columns, self.reserved)
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, self.columns : end] = keys.detach()
        self.values[:, :, self.columns : end] = values.detach()
        return self.keys[:, :, :end], self.values[:, :, :end]

    def take_in(self, keys: Tensor, values: Tensor, new: int, tokens: Tensor | None) -> None:
        """Store the new keys and values in the rings, and count them; a plain layer has stored them already.

        Args:
            keys: ``(batch, KV heads, new, head_dim)``; a plain layer does not look at them.
            values: likewise.
            new: columns.
            tokens: ``(batch, new)``, false for padding; None if there is none.
        """
        keys, values = keys.detach(), values.detach()
        tokens = None if tokens is None else tokens.to(self.device)
        before, self.count = self.count, self.count + (new if tokens is None else tokens.sum(1))
        if not self.rings:
            self._note_padding(new, tokens)
        elif isinstance(before, int) and isinstance(self.count, int) and self._alike():
            for ring in self.rings:
                mine = heads_of(keys, ring.heads), heads_of(values, ring.heads)
                if new == 1:
                    ring.put(*mine, before)
                else:
                    ring.store_run(*mine, before, self.count)
        else:
            places = positions(before, new, tokens, self.device)[1]
            for ring in self.rings:
                mine = heads_of(keys, ring.heads), heads_of(values, ring.heads)
                if new == 1:
                    ring.store_one(*mine, places.expand(keys.shape[0], -1))
                else:
                    ring.store(*mine, places, self.count)
        self.columns += new

    def _alike(self) -> bool:
        return all(isinstance(ring.base, int) for ring in self.rings)

    def _note_padding(self, new: int, tokens: Tensor | None) -> None:
        if tokens is None and self.padding is None:
            return
        rows = len(tokens) if tokens is not None else len(self.padding)  # type: ignore[arg-type]
        blank = torch.ones(1, 1, dtype=torch.bool, device=self.device)
        before = blank.expand(rows, self.columns) if self.padding is None else self.padding
        self.padding = torch.cat([before, blank.expand(rows, new) if tokens is None else tokens], 1)

    def used_bytes(self) -> int:
        """Bytes of the keys and values that are held by now, without slots that wait for tokens to come."""
        if self.keys is None or self.values is None:
            return 0
        rows = self.keys.shape[0]
        if not self.rings:
            used = rows * self.keys.shape[1] * self.columns
        else:
            filled = [(len(ring.heads), ring.filled(self.count)) for ring in self.rings]
            used = sum(heads * (int(n.sum()) if isinstance(n, Tensor) else rows * n) for heads, n in filled)
        return used * sum(buffer.shape[-1] * buffer.dtype.itemsize for buffer in (self.keys, self.values))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are made for the whole text, padding included."""
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns of the text so far; not how many of them are kept."""
        return self.columns

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget the text; the schedule stays."""
        self.__init__(self.index, self.schedule, self.owner)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in a new order, as beam search asks for."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        rows = 0 if self.keys is None else self.keys.shape[0]
        self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows, or one row several times."""
        if self.keys is None or self.values is None:
            return
        rows = indices.to(self.device)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        parts = {ring.heads: ring.span for ring in self.rings}
        for ring, keys, values in zip(
            self.rings, views_of(self.keys, parts), views_of(self.values, parts), strict=True
        ):
            ring.keys, ring.values = keys, values
            if isinstance(ring.base, Tensor):
                ring.base = ring.base.index_select(0, rows)
        if self.padding is not None:
            self.padding = self.padding.index_select(0, rows)
        if isinstance(self.count, Tensor):
            self.count = self.count.index_select(0, rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what a ring has overwritten cannot come back."""
        raise NotImplementedError(NOT_CROPPABLE)


def fit(cache: Cache, owner: Owner, length: int = 0) -> None:
    """Make ``cache`` follow the owner's plan, in place: full-attention layers become `SpanLayer`.

    Args:
        cache: an empty `DynamicCache`, or one that already follows an equal plan and goes on.
        owner: the application of the plan.
        length: the ``N`` its text is known to reach, 0 if unknown.

    Raises:
        ValueError: another kind of cache, or one that was filled without this plan.
    """
    if not isinstance(cache, DynamicCache) or cache.offloading:
        kind = "an offloaded cache" if getattr(cache, "offloading", False) else type(cache).__name__
        raise ValueError(
            f"a span plan brings its own cache and cannot use {kind}; pass no cache, or an empty DynamicCache"
        )
    known = [layer for layer in cache.layers if isinstance(layer, SpanLayer)]
    for layer in known:
        if layer.owner is not owner and (layer.owner.active or layer.owner.spans.plan != owner.spans.plan):
            raise ValueError("this cache was filled under another span plan; start with a new cache")
        layer.owner = owner
    if known:
        known[0].schedule.length = max(known[0].schedule.length, length, owner.length)
        return
    if cache.get_seq_length() > 0:
        raise ValueError(
            "this cache was filled before the plan was applied, or with gradients on; start with a new cache "
            "inside apply_spans, under torch.no_grad()"
        )
    schedule = Schedule(owner.spans, max(length, owner.length))
    cache.layer_class_to_replicate = None
    cache.layers[:] = [
        SpanLayer(index, schedule, owner) if window is None else DynamicSlidingWindowLayer(window)
        for index, window in enumerate(owner.spans.shape.windows)
    ]


def cache_bytes(cache: Cache, *, used: bool = False) -> int:
    """Bytes of keys and values that a cache has memory for, under a plan or not.

    Args:
        cache: of one model.
        used: count the tokens that are held, not the slots that a plan's cache keeps for those to come.
    """
    if used:
        return sum(_used(layer) for layer in cache.layers)
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(tensor.nbytes for tensor in tensors)


def _used(layer: Any) -> int:
    if isinstance(layer, SpanLayer):
        return layer.used_bytes()
    return sum(tensor.nbytes for tensor in (layer.keys, layer.values) if tensor is not None)


def _longer(buffer: Tensor | None, like: Tensor, used: int, slots: int) -> Tensor:
    longer = like.new_zeros(*like.shape[:2], slots, like.shape[-1])
    if buffer is not None:
        longer[:, :, :used] = buffer[:, :, :used]
    return longer
