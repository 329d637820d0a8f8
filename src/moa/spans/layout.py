"""Which keys a query sees: token masks for running, block layouts of the published search for densities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from moa.spans import densities
from moa.spans.convention import CONVENTIONS
from moa.spans.plan import SpanPlan

Position = TypeVar("Position", int, Tensor)
HIDDEN = 1 << 40  # position of a key that nobody sees: later than every query


@dataclass(frozen=True)
class Sight:
    """What a query sees of its past.

    Attributes:
        sink: first tokens that are always seen.
        block: granularity of a blockwise prefill, tokens.
        blockwise: rows of a prefill see whole blocks (published plans); else every row is exact to the token.
    """

    sink: int
    block: int
    blockwise: bool

    @classmethod
    def of(cls, plan: SpanPlan) -> Sight:
        """The sight of a plan's heads."""
        return cls(plan.sink, plan.block, CONVENTIONS[plan.convention].blockwise_prefill)

    def oldest(self, position: Position, span: int) -> Position:
        """The first position of the window (the sink aside) of queries at ``position`` in a prefill."""
        window = max(span - self.sink, 0)
        if self.blockwise:
            return (position // self.block + 1 - -(-window // self.block)) * self.block
        return position + 1 - window

    def visible(self, queries: Tensor, keys: Tensor, span: int) -> Tensor:
        """The mask of a prefill.

        Args:
            queries: positions ``(..., q)``; negative ones are padding and see everything, so that no row is empty.
            keys: positions ``(..., k)``; `HIDDEN` ones are seen by no token.
            span: of the head, sink included.

        Returns:
            ``(..., q, k)``, true where a query sees a key.
        """
        oldest = self.oldest(queries, span)[..., None]
        query, key = queries[..., None], keys[..., None, :]
        return (key <= query) & ((key < self.sink) | (key >= oldest)) | (query < 0)


def positions(count: int | Tensor, new: int, tokens: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of ``new`` columns that follow ``count`` tokens; padding is no token and takes none.

    Args:
        count: tokens of every row so far, ``(batch,)`` if they differ.
        new: columns.
        tokens: ``(batch, new)``, false for padding; None if there is none.
        device: of the result.

    Returns:
        Positions as queries and as keys, ``(1 or batch, new)``. Padding is `HIDDEN` as a key; as a query it is where
        the token before it is, -1 if there is none.
    """
    start = torch.as_tensor(count, device=device).reshape(-1, 1)
    if tokens is None:
        found = start + torch.arange(new, device=device)
        return found, found
    found = start + tokens.to(device).cumsum(1) - 1
    return found, torch.where(tokens.to(device), found, HIDDEN)


def published_layout(alpha: float, beta: float, length: int, block: int = 64) -> Tensor:
    """The causal block layout of the published search, ``(length / block, length / block)``, true where kept.

    A band next to the diagonal and the first block on top of it (thu-nics/MoA ``pattern.py:11-69,149-183``).
    """
    blocks = length // block
    band = densities.search_band(alpha, beta, blocks, block)
    row, column = torch.arange(blocks)[:, None], torch.arange(blocks)[None]
    return (column <= row) & ((column < 1) | (column > row - band))
