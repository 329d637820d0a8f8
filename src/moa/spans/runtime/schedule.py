"""How long a text gets, and so how long the spans are.

Spans follow from ``N``, the length the text is known to reach: what `apply_spans` was told, else what ``generate`` is
about to reach (prompt and new tokens), else what has been seen (a published plan adds 1024 tokens to a prefill). ``N``
counts columns, padding included: the longest row decides for a batch. It never shrinks. A text that outgrows it moves
it: to the new length at a prefill, in steps of four blocks while decoding.
"""

from __future__ import annotations

import logging
from typing import Any

from moa.spans.convention import CONVENTIONS
from moa.spans.plan import SpanPlan
from moa.spans.shape import ModelShape

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
    """

    def __init__(self, spans: Spans, length: int = 0) -> None:
        self.spans, self.length = spans, length
        self._warned = False

    def extend(self, text: int, new: int) -> None:
        """``new`` tokens make the text ``text`` tokens long."""
        self.length = self.spans.reach(self.length, text, new)

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
