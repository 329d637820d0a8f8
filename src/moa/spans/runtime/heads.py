"""Groups of heads with the same span, and their parts of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor


def groups(spans: Sequence[int], among: Iterable[int] | None = None) -> dict[tuple[int, ...], int]:
    """Heads with the same span, and that span; shortest first. ``among``: of these heads only."""
    heads = range(len(spans)) if among is None else among
    found: dict[int, list[int]] = {}
    for head in heads:
        found.setdefault(spans[head], []).append(head)
    return {tuple(found[span]): span for span in sorted(found)}


def heads_of(tensor: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Some heads of ``(batch, heads, n, head_dim)``; a view if they are neighbours."""
    if heads[-1] - heads[0] == len(heads) - 1:
        return tensor[:, heads[0] : heads[-1] + 1]
    return tensor[:, list(heads)]


def views_of(buffer: Tensor, parts: dict[tuple[int, ...], int]) -> list[Tensor]:
    """Each group's part of a layer's buffer, ``(batch, heads, span, head_dim)``."""
    if not parts:
        return []
    sizes = [len(heads) * span for heads, span in parts.items()]
    found = buffer.split(sizes, 1)
    return [view.unflatten(1, (len(heads), span)) for view, (heads, span) in zip(found, parts.items(), strict=True)]
