"""Keys and values of the KV heads of one layer that have the same span: a sink and a ring, nothing more.

The first tokens of a row lie in the sink slots for good. Every later token at position ``p`` goes to ring slot
``(p - base) mod ring``, over the token that has just left the window. Keys keep the rotary positions they came with.
Rows count their own tokens: padding is never stored, so left padding costs nothing and changes nothing.

A count of tokens is an ``int`` while all rows are alike (no padding so far) and a tensor ``(batch,)`` after that.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from moa.spans.layout import HIDDEN

Count: TypeAlias = int | Tensor


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

    def put(self, keys: Tensor, values: Tensor, position: int) -> None:
        """Store one token ``(batch, heads, 1, head_dim)`` of every row; all rows are at ``position``."""
        assert isinstance(self.base, int)
        slot = position if position < self.sink else self.sink + (position - self.base) % self.slots
        self.keys[:, :, slot : slot + 1] = keys
        self.values[:, :, slot : slot + 1] = values

    def store_run(self, keys: Tensor, values: Tensor, start: int, end: int) -> None:
        """`store` of neighbouring tokens of rows that are alike: two copies at most, and no question to the device.

        Args:
            keys: ``(batch, heads, n, head_dim)``, the first at position ``start``.
            values: likewise.
            start: position of the first.
            end: tokens of the text, these included.
        """
        assert isinstance(self.base, int)
        self._copy(keys, values, start, start, min(start + keys.shape[2], self.sink), start)
        first = max(end - self.slots, self.base, start)
        last = min(start + keys.shape[2], end)
        while first < last and self.slots:
            slot = self.sink + (first - self.base) % self.slots
            until = min(last, first + self.span - slot)
            self._copy(keys, values, start, first, until, slot)
            first = until

    def _copy(self, keys: Tensor, values: Tensor, start: int, first: int, last: int, slot: int) -> None:
        """Tokens at positions ``first:last``, of those from ``start`` on, into the slots from ``slot`` on."""
        if first < last:
            part, slots = slice(first - start, last - start), slice(slot, slot + last - first)
            self.keys[:, :, slots] = keys[:, :, part]
            self.values[:, :, slots] = values[:, :, part]

    def store_one(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Store the latest token of every row, without a question to the device.

        Args:
            keys: ``(batch, heads, 1, head_dim)``.
            values: likewise.
            positions: ``(batch, 1)``, `HIDDEN` for rows that have none: what they hold stays.
        """
        turn = self.sink + (positions - self._column(self.base)) % max(self.slots, 1)
        slot = torch.where(positions < self.sink, positions, turn)[:, 0]
        row, token = torch.arange(len(slot), device=slot.device), (positions < HIDDEN)[:, :, None]
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer[row, :, slot] = torch.where(token, new[:, :, 0], buffer[row, :, slot])

    def store(self, keys: Tensor, values: Tensor, positions: Tensor, end: Count) -> None:
        """Store the tokens that a text of ``end`` tokens still sees, others are dropped.

        Args:
            keys: ``(batch, heads, n, head_dim)``.
            values: likewise.
            positions: ``(1 or batch, n)``, `HIDDEN` for columns that are no token.
            end: tokens of every row, these included.
        """
        base, last = self._column(self.base), self._column(end)
        keep = (positions < self.sink) | ((positions >= last - self.slots) & (positions < last) & (positions >= base))
        slots = torch.where(positions < self.sink, positions, self.sink + (positions - base) % max(self.slots, 1))
        if positions.shape[0] == 1:
            column = keep[0].nonzero()[:, 0]
            for buffer, new in ((self.keys, keys), (self.values, values)):
                buffer.index_copy_(2, slots[0, column], new.index_select(2, column))
            return
        row, column = keep.nonzero(as_tuple=True)
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer[row, :, slots[row, column]] = new[row, :, column]

    def filled(self, count: Count) -> Count:
        """Slots in use after ``count`` tokens; they come first in the buffers."""
        if isinstance(count, int) and isinstance(self.base, int):
            return min(count, self.sink) + min(max(count - self.base, 0), self.slots)
        end, base = self._column(count)[:, 0], self._column(self.base)[:, 0]
        return end.clamp(max=self.sink) + (end - base).clamp(0, self.slots)

    def positions(self, count: Count) -> tuple[Tensor, Tensor]:
        """Slots in the order of their tokens, and the positions of these, after ``count`` tokens.

        Returns:
            Slots ``(1 or batch, n)`` and positions of the same shape, `HIDDEN` where a row has no such token.
        """
        base, end = self._column(self.base), self._column(count)
        held = self.slots
        if isinstance(count, int) and isinstance(self.base, int):
            held = min(max(count - self.base, 0), self.slots)
        later = end - held + torch.arange(held, device=end.device)
        first = torch.arange(min(count, self.sink) if isinstance(count, int) else self.sink, device=end.device)
        first = first.expand(later.shape[0], -1)
        found = torch.cat([first < end, later >= base], 1)
        positions = torch.cat([first, later], 1)
        slots = torch.cat([first, self.sink + (later - base) % max(self.slots, 1)], 1)
        return torch.where(found, slots, 0), torch.where(found, positions, HIDDEN)

    def held(self, count: int) -> tuple[int, int]:
        """Of rows that are alike after ``count`` tokens: how many of the first are held, and the oldest later one."""
        assert isinstance(self.base, int)
        return min(count, self.sink), count - min(max(count - self.base, 0), self.slots)

    def read(self, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``(batch, heads, n, head_dim)`` of rows that are alike, in the text's order."""
        assert isinstance(self.base, int)
        first, start = self.held(count)
        turn = (start - self.base) % max(self.slots, 1)
        kept = self.sink + count - start
        parts = [slice(0, first), slice(self.sink + turn, kept), slice(self.sink, min(self.sink + turn, kept))]
        return torch.cat([self.keys[:, :, part] for part in parts], 2), torch.cat(
            [self.values[:, :, part] for part in parts], 2
        )

    def history(self, count: Count) -> tuple[Tensor, Tensor, Tensor]:
        """What is held after ``count`` tokens, in the text's order.

        Returns:
            Keys and values ``(batch, heads, n, head_dim)``, copies, and positions ``(1 or batch, n)``.
        """
        slots, positions = self.positions(count)
        if slots.shape[0] == 1:
            return self.keys.index_select(2, slots[0]), self.values.index_select(2, slots[0]), positions
        row = torch.arange(slots.shape[0], device=slots.device)[:, None]
        return self.keys[row, :, slots].transpose(1, 2), self.values[row, :, slots].transpose(1, 2), positions

    def take_over(self, other: Ring, count: Count) -> None:
        """Everything that ``other``, a shorter ring of these heads and maybe more, holds after ``count`` tokens."""
        mine = [other.heads.index(head) for head in self.heads]
        base = count - (other.filled(count) - other.sink)
        if isinstance(base, int) and isinstance(count, int):
            self.base = max(base, self.sink)
            first, start = other.held(count)
            keys, values = (part[:, mine] for part in other.read(count))
            self.store_run(keys[:, :, :first], values[:, :, :first], 0, count)
            self.store_run(keys[:, :, first:], values[:, :, first:], start, count)
            return
        keys, values, positions = other.history(count)
        self.base = torch.as_tensor(base, device=keys.device).clamp(min=self.sink)
        self.store(keys[:, mine], values[:, mine], positions, count)

    def _column(self, count: Count) -> Tensor:
        return torch.as_tensor(count, device=self.keys.device).reshape(-1, 1)
