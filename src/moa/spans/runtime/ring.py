"""Keys and values of the KV heads of one layer that have the same span: a sink and a ring, nothing more.

The first tokens of a row lie in the sink slots for good. Every later token at position ``p`` goes to ring slot
``(p - base) mod ring``, over the token that has just left the window. Keys keep the rotary positions they came with.
Rows count their own tokens: padding is never stored, so left padding costs nothing and changes nothing.

A count of tokens is an ``int`` where the host knows it and all rows are alike, else a tensor ``(batch,)``. No value of
a tensor is asked for, and no shape depends on a tensor's count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from moa.spans.runtime.visibility import HIDDEN, Key

Count: TypeAlias = int | Tensor


def groups(spans: Sequence[int], among: Iterable[int] | None = None) -> dict[tuple[int, ...], int]:
    """Heads with the same span, and that span; shortest first. ``among``: of these heads only."""
    found: dict[int, list[int]] = {}
    for head in range(len(spans)) if among is None else among:
        found.setdefault(spans[head], []).append(head)
    return {tuple(found[span]): span for span in sorted(found)}


def runs(heads: Sequence[int], shared: int = 1) -> list[slice]:
    """Neighbours among heads; ``shared``: as heads of a tensor that has so many for each of these."""
    ends = [at for at in range(1, len(heads)) if heads[at] != heads[at - 1] + 1]
    return [
        slice(heads[first] * shared, (heads[last - 1] + 1) * shared)
        for first, last in zip([0, *ends], [*ends, len(heads)], strict=True)
    ]


def heads_of(tensor: Tensor, heads: Sequence[int], shared: int = 1) -> Tensor:
    """Some heads of ``(batch, heads, n, head_dim)``, by slices: a list of heads would be sent to the device."""
    parts = [tensor[:, part] for part in runs(heads, shared)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def views_of(buffer: Tensor, parts: dict[tuple[int, ...], int]) -> list[Tensor]:
    """Each group's part of a layer's buffer, ``(batch, heads, span, head_dim)``."""
    if not parts:
        return []
    found = buffer.split([len(heads) * span for heads, span in parts.items()], 1)
    return [view.unflatten(1, (len(heads), span)) for view, (heads, span) in zip(found, parts.items(), strict=True)]


class Ring:
    """A ring on buffers of its layer.

    Args:
        heads: KV heads of the layer.
        span: slots, sink included.
        sink: slots of the sink; the span's if that is shorter.
        keys: buffer ``(batch, heads, span, head_dim)``.
        values: likewise.

    Attributes:
        base: position of the token in ring slot 0: the sink's end, unless the ring took over from a shorter one.
    """

    def __init__(self, heads: tuple[int, ...], span: int, sink: int, keys: Tensor, values: Tensor) -> None:
        self.heads, self.span, self.sink = heads, span, min(sink, span)
        self.keys, self.values = keys, values
        self.base: Count = self.sink

    @property
    def slots(self) -> int:
        """Slots of the ring, the sink aside."""
        return self.span - self.sink

    @property
    def kind(self) -> Key:
        """Equal for rings of one cache that hold the same positions, as long as these rings live."""
        return self.span, self.sink, self.base if isinstance(self.base, int) else id(self.base), self.keys.device

    def filled(self, count: Count) -> Count:
        """Slots in use after ``count`` tokens; they come first in the buffers."""
        if isinstance(count, int) and isinstance(self.base, int):
            return min(count, self.sink) + min(max(count - self.base, 0), self.slots)
        return _tensor(count, self).clamp(max=self.sink) + (_tensor(count, self) - self.base).clamp(0, self.slots)

    def places(self, count: Count) -> Tensor:
        """Positions of the tokens in all slots after ``count`` tokens, ``(1 or batch, span)``; `HIDDEN`: none."""
        slot = torch.arange(self.span, device=self.keys.device)[None]
        last, base = _column(count) - 1, _column(self.base)
        latest = last - (last - base - slot + self.sink) % max(self.slots, 1)
        held = torch.where(slot < self.sink, slot <= last, latest >= base)
        return torch.where(held, torch.where(slot < self.sink, slot, latest), HIDDEN)

    def put(self, keys: Tensor, values: Tensor, count: Count, tokens: Tensor | None = None) -> None:
        """Store one column ``(batch, heads, 1, head_dim)`` after ``count`` tokens.

        Args:
            keys: of the column.
            values: likewise.
            count: an ``int`` only if every row has a token there.
            tokens: ``(batch,)``, 0 for rows of which the column is padding: what they hold stays.
        """
        if isinstance(count, int):
            assert isinstance(self.base, int)
            slot = count if count < self.sink else self.sink + (count - self.base) % self.slots
            self.keys[:, :, slot : slot + 1] = keys
            self.values[:, :, slot : slot + 1] = values
            return
        place = torch.where(count < self.sink, count, self.sink + (count - self.base) % max(self.slots, 1))
        for buffer, new in ((self.keys, keys), (self.values, values)):
            at = place[:, None, None, None].expand_as(new)
            if tokens is not None:
                new = torch.where(tokens[:, None, None, None] > 0, new, buffer.gather(2, at))
            buffer.scatter_(2, at, new)

    def store(self, keys: Tensor, values: Tensor, count: Count, places: Tensor) -> None:
        """Store columns of which every row's tokens come first; those that the text no longer sees are dropped.

        Args:
            keys: ``(batch, heads, n, head_dim)``.
            values: likewise.
            count: tokens before these.
            places: `places` after these.
        """
        source = places - _column(count)
        self._fill(keys, values, source, (source >= 0) & (source < keys.shape[2]))

    def take_over(self, other: Ring, count: Count) -> None:
        """Everything that ``other``, a shorter ring of these heads and maybe more, holds after ``count`` tokens."""
        mine = [other.heads.index(head) for head in self.heads]
        base = count - (other.filled(count) - other.sink)
        self.base = max(base, self.sink) if isinstance(base, int) else base.clamp(min=self.sink)
        places = self.places(count)
        turn = self.sink + (places - _column(other.base)) % max(other.slots, 1)
        source = torch.where(places < self.sink, places, turn)
        self._fill(heads_of(other.keys, mine), heads_of(other.values, mine), source, places < HIDDEN)

    def _fill(self, keys: Tensor, values: Tensor, source: Tensor, found: Tensor) -> None:
        """Every slot from the column ``source`` says, ``(1 or batch, span)``, where that is ``found``."""
        source = torch.where(found, source, 0)
        for buffer, new in ((self.keys, keys), (self.values, values)):
            if len(source) == 1:
                picked = new.index_select(2, source[0])
            else:
                picked = new.gather(2, source[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]))
            buffer.copy_(torch.where(found[:, None, :, None], picked, buffer))


def _column(count: Count) -> Count:
    return count if isinstance(count, int) else count[:, None]


def _tensor(count: Count, ring: Ring) -> Tensor:
    return torch.full((1,), count, device=ring.keys.device) if isinstance(count, int) else count
