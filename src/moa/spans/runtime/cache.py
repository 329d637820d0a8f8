"""The cache of a span plan: how long spans are now, and a ring for each group of KV heads with the same one.

How long spans are follows from ``N``, the length the text is known to reach: what `apply_spans` was told, else what
``generate`` is about to reach (prompt and new tokens), else what has been seen (a published plan adds 1024 tokens to a
prefill). ``N`` counts columns, padding included: the longest row decides for a batch. It never shrinks. A text that
outgrows it moves it: to the new length at a prefill, in steps of four blocks while decoding.

A layer whose heads are all dense keeps a plain buffer that grows, in the text's own columns, so that its attention is
the host's, bit for bit. Every other layer hands out the new keys only; `moa.spans.runtime.attention` reads the rings.

A *static* cache has rings in every layer, at its full ``N`` from the start, and counts on the device: no shape and no
number of the host changes from token to token, so a compiled graph or a CUDA graph of one token serves for all.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol
from weakref import ReferenceType

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from moa import _hosts
from moa.spans.model import ModelShape
from moa.spans.plan import SpanPlan
from moa.spans.rule import CONVENTIONS
from moa.spans.runtime.ring import Count, Ring, groups, heads_of, views_of
from moa.spans.runtime.visibility import Padding, Sight, TextMask

NOT_CROPPABLE = (
    "a cache under a span plan cannot be cropped, so assisted and speculative decoding cannot use it; decode without "
    "an assistant, or without the plan"
)

STEP = 4  # blocks

log = logging.getLogger(__name__)


class Spans:
    """A plan's spans on the KV heads of one model, by length."""

    def __init__(self, plan: SpanPlan, config: Any) -> None:
        plan.for_model(config)  # raises if the plan is for another model
        self.plan, self.config, self.shape = plan, config, ModelShape.of(config)
        self._known: dict[int, tuple[tuple[int, ...], ...]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Spans:
        return self  # a copied cache still follows the same plan

    def at(self, length: int) -> tuple[tuple[int, ...], ...]:
        """Layers x KV heads: spans of a text of ``length`` tokens."""
        if length not in self._known:
            rows = self.plan.for_model(self.config, length).spans(length)
            self._known[length] = tuple(tuple(row) for row in rows)
        return self._known[length]

    def reach(self, length: int, text: int, new: int) -> int:
        """``N`` after ``new`` tokens made the text ``text`` tokens long, when it was ``length`` before."""
        if text <= length:
            return length
        if new == 1 and text > 1:
            step = STEP * self.plan.block
            return -(-text // step) * step
        return text + CONVENTIONS[self.plan.convention].to_come


class Schedule:
    """The ``N`` of one text, shared by the layers of its cache.

    Args:
        spans: by length.
        length: the ``N`` that is known beforehand, 0 if none is.
        static: whether it stays at that.
    """

    def __init__(self, spans: Spans, length: int = 0, static: bool = False) -> None:
        self.spans, self.length, self.static = spans, length, static
        self._warned = False

    def expect(self, text: int) -> None:
        """The text is known to reach ``text`` tokens.

        Raises:
            ValueError: that is more than a static schedule has.
        """
        if self.static and text > self.length:
            raise ValueError(
                f"the text gets {text} tokens long, and static=True has laid its cache out for length={self.length}; "
                "give apply_spans the tokens that the longest text reaches"
            )
        self.length = max(self.length, text)

    def extend(self, text: int, new: int) -> None:
        """``new`` tokens make the text ``text`` tokens long."""
        self.expect(text if self.static else self.spans.reach(self.length, text, new))

    def of(self, layer: int) -> tuple[int, ...]:
        """The spans of a layer's KV heads now, sink included, tokens."""
        return self.spans.at(self.length)[layer]

    def warn_once(self, columns: int) -> None:
        """Tell that spans grow after tokens were let go of that they would have kept."""
        if not self._warned:
            self._warned = True
            log.warning(
                "the text outgrew the length that its cache was laid out for (%d tokens so far): spans get longer, but "
                "what has left a window is gone. Several turns on one cache: apply_spans(model, plan, length=...) with "
                "the tokens of all turns",
                columns,
            )


class Handover(threading.local):
    """What a cache tells the attention function that follows it, apart for every thread.

    Attributes:
        layer: the layer that took keys last; None once attention has taken it from here.
        read: the index of the layer whose cache was read last in this forward, None before the first.
        longest: a custom mask, and the tokens of the longest text under it.
    """

    layer: SpanLayer | None = None
    read: int | None = None
    longest: tuple[ReferenceType[Tensor], int] | None = None


class Owner(Protocol):
    """The application of a plan to a model, as far as a cache knows it.

    Attributes:
        active: whether the plan is applied.
        spans: the plan's, on the model's heads.
        length: the ``N`` that the application was told, 0 if none.
        static: whether caches are.
        handover: from a layer that took keys to the attention function that follows.
    """

    active: bool
    spans: Spans
    sight: Sight
    length: int
    static: bool
    handover: Handover


class SpanLayer(CacheLayerMixin):
    """Keys and values of one attention layer under a plan.

    Args:
        index: of the layer.
        schedule: shared by the layers of a cache.
        owner: the application of the plan that this cache belongs to; it is told of every update.

    Attributes:
        columns: columns of the text so far, padding included; of a static cache, those that no compiled graph took in.
        begun: whether there are any.
        count: tokens of every row, without padding.
        seen: the columns of a static cache, counted on the device.
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
        self.columns, self.reserved, self.begun = 0, 0, False
        self.count: Count = 0
        self.seen: Tensor | None = None
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
            ValueError: gradients are wanted, which would end here without a word.
        """
        if not self.owner.active:
            raise RuntimeError(
                "this cache was filled under a span plan that is no longer applied; apply it again, or "
                "start with a new cache"
            )
        if key_states.requires_grad or value_states.requires_grad:
            raise ValueError(
                f"layer {self.index}: a cache under a span plan takes no keys and values with gradients; go on with "
                "it under torch.no_grad(), or learn from the whole text without a cache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not torch.compiler.is_compiling():
            self._leave_inference_mode()
        new = key_states.shape[-2]
        if not (self.schedule.static and torch.compiler.is_compiling()):
            self.schedule.extend(self.columns + new, new)
        self._fit(key_states, value_states)
        self.owner.handover.layer = self
        if self.rings:
            return key_states, value_states
        return self._append(key_states, value_states)

    def _leave_inference_mode(self) -> None:
        """Copy what was made inside of it, once: outside, torch changes no such tensor in place."""
        if self.keys is None or not self.keys.is_inference() or torch.is_inference_mode_enabled():
            return
        self.batch_select_indices(torch.arange(len(self.keys)))
        if self.seen is not None:
            self.seen = self.seen.clone()

    def _fit(self, keys: Tensor, values: Tensor) -> None:
        """Make the storage that the schedule asks for now."""
        spans, sink = self.schedule.of(self.index), self.schedule.spans.plan.sink
        if self.schedule.static:
            if self.keys is None or (not self.begun and len(self.keys) != len(keys)):
                self.rings = self._lay_out(groups(spans), keys, values, sink)
                self._count_on_device(len(keys))
        elif not self.rings and min(spans) == self.schedule.length:
            return
        elif not self.rings:
            self._move_in(groups(spans), keys, values, sink)
        elif any(spans[head] != ring.span for ring in self.rings for head in ring.heads):
            self._grow(spans, keys, values, sink)

    def _move_in(self, parts: dict[tuple[int, ...], int], keys: Tensor, values: Tensor, sink: int) -> None:
        """From a plain buffer, or nothing, into rings."""
        old = self.keys, self.values
        padding = None if self.padding is None else Padding(self.padding)
        self.rings, self.padding = self._lay_out(parts, keys, values, sink), None
        if old[0] is None or old[1] is None:
            return
        keys, values = (tensor[:, :, : self.columns] for tensor in old if tensor is not None)
        if padding is not None:
            keys, values = padding.pack(keys), padding.pack(values)
        for ring in self.rings:
            places = ring.places(self.count)
            ring.store(heads_of(keys, ring.heads), heads_of(values, ring.heads), 0, places)

    def _count_on_device(self, rows: int) -> None:
        self.count = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.seen = torch.zeros((), dtype=torch.long, device=self.device)
        assert self.keys is not None
        assert self.values is not None
        if not torch.compiler.is_compiling():
            for tensor in (self.keys, self.values, self.count, self.seen):
                _hosts.keep_address(tensor)

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
        self.keys[:, :, self.columns : end] = keys
        self.values[:, :, self.columns : end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]

    def take_in(self, keys: Tensor, values: Tensor, new: int, padding: Padding | None, text: TextMask) -> None:
        """Store the new keys and values in the rings, and count them; a plain layer has stored them already.

        Args:
            keys: ``(batch, KV heads, new, head_dim)``, every row's tokens first; a plain layer does not look at them.
            values: likewise.
            new: columns.
            padding: among them.
            text: of this forward.
        """
        before = self.count
        if padding is not None and isinstance(before, int):
            before = torch.full((len(keys),), before, device=keys.device)
        after = before + (new if padding is None else padding.tokens)
        for ring in self.rings:
            mine = heads_of(keys, ring.heads), heads_of(values, ring.heads)
            if new == 1:
                ring.put(*mine, before, None if padding is None else padding.tokens)
            else:
                ring.store(*mine, before, text.once(("after", ring.kind), partial(ring.places, after)))
        if not self.rings:
            self._note_padding(new, padding)
        self.begun = True
        if self.seen is None:
            self.count = after
            self.columns += new
        else:
            assert isinstance(self.count, Tensor)
            self.count.copy_(after)
            self.seen.add_(new)
            if not torch.compiler.is_compiling():
                self.columns += new

    def _note_padding(self, new: int, padding: Padding | None) -> None:
        if padding is None and self.padding is None:
            return
        rows = len(self.padding if padding is None else padding.flags)  # type: ignore[arg-type]
        blank = torch.ones(1, 1, dtype=torch.bool, device=self.device)
        before = blank.expand(rows, self.columns) if self.padding is None else self.padding
        self.padding = torch.cat([before, blank.expand(rows, new) if padding is None else padding.flags], 1)

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
        return (self.schedule.length if self.seen is not None and self.begun else self.columns + query_length), 0

    def get_seq_length(self) -> int:
        """Columns of the text so far; not how many of them are kept. A static layer has them on the device."""
        return self.seen if self.seen is not None and self.begun else self.columns  # type: ignore[return-value]

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget the text; the schedule stays, and a static layer's tensors do."""
        if self.seen is None:
            self.__init__(self.index, self.schedule, self.owner)  # type: ignore[misc]
            return
        assert isinstance(self.count, Tensor)
        self.columns, self.begun = 0, False
        self.count.zero_()
        self.seen.zero_()

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
        known[0].schedule.expect(max(length, owner.length))
        return
    if cache.get_seq_length() > 0:
        raise ValueError(
            "this cache was filled before the plan was applied, or with gradients on; start with a new cache "
            "inside apply_spans, under torch.no_grad()"
        )
    schedule = Schedule(owner.spans, owner.length, owner.static)
    schedule.expect(length)
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
