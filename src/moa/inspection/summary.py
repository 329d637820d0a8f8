"""An inspection in a handful of numbers, to set two adapters side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from moa.inspection.results import Inspection, Similarity


@dataclass
class Summary:
    """Means over all routers or blocks; None where there is nothing to average.

    Attributes:
        dead: dead experts and copies.
        columns: all experts and copies that a router decides about.
        used: mean utilisation of the block routers' experts.
        entropy: mean entropy of the block routers' gates.
        copies_entropy: mean entropy of the routes over copies.
        experts_cka: mean CKA between different experts of a block.
        copies_cka: mean CKA between different copies of an expert.
        copies_cosine: mean cosine between different copies of an expert.
    """

    dead: int
    columns: int
    used: float | None
    entropy: float | None
    copies_entropy: float | None
    experts_cka: float | None
    copies_cka: float | None
    copies_cosine: float | None


def summary(found: Inspection) -> Summary:
    """The numbers over all data sets and blocks."""
    own = [router for router in found.pooled.routers if router.site is None]
    copies = [router for router in found.pooled.routers if router.site is not None]
    between_copies = [entry for entry in found.similarity if entry.site is not None]
    return Summary(
        dead=len(found.dead),
        columns=sum(len(router.columns) for router in found.pooled.routers),
        used=known_mean(share for router in own for share in router.used),
        entropy=known_mean(router.entropy for router in own),
        copies_entropy=known_mean(router.entropy for router in copies),
        experts_cka=known_mean(
            value for entry in found.similarity if entry.site is None for value in _pairs(entry.cka)
        ),
        copies_cka=known_mean(value for entry in between_copies for value in _pairs(entry.cka)),
        copies_cosine=known_mean(value for entry in between_copies for value in _pairs(entry.cosine or [])),
    )


def mean_over_blocks(entries: Sequence[Similarity]) -> tuple[list[str], list[list[float | None]]]:
    """Names of all outputs in ``entries`` and the mean CKA of every pair over the blocks that have both."""
    names = list(dict.fromkeys(name for entry in entries for name in entry.names))
    return names, [[known_mean(_between(entry, left, right) for entry in entries) for right in names] for left in names]


def _between(entry: Similarity, left: str, right: str) -> float | None:
    if left not in entry.names or right not in entry.names:
        return None
    return entry.cka[entry.names.index(left)][entry.names.index(right)]


def _pairs(matrix: Sequence[Sequence[float | None]]) -> list[float | None]:
    return [value for place, row in enumerate(matrix) for value in row[place + 1 :]]


def known_mean(values: Iterable[float | None]) -> float | None:
    """None if none is known."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
