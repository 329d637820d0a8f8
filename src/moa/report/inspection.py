"""The page of an inspection, for one adapter or for two side by side, and the numbers beside it as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moa.adapters.telemetry import DEAD
from moa.evaluation.results import write
from moa.inspection.collect import all_columns
from moa.inspection.results import Example, Inspection, RouterStatistics, SetStatistics, Similarity, Strongest
from moa.inspection.statistics import SOFT_LEVEL
from moa.inspection.summary import mean_over_blocks, summary
from moa.report.page import Cell, Markup, render, tinted, write_page

COLOURS = 8
"""Experts have one of so many colours; their names stand beside, so that a ninth may share the first one's."""

NOTHING = "–"

Table = tuple[str, Sequence[str], Sequence[Sequence[str | Cell]]]
"""Caption, head and rows, for the macro ``table``."""

SUMMARY = {
    "dead": "dead experts and copies",
    "columns": "experts and copies under a router",
    "used": "mean utilisation of experts",
    "entropy": "mean entropy of gates",
    "copies_entropy": "mean entropy of routes over copies",
    "experts_cka": "mean similarity (CKA) of a block's experts",
    "copies_cka": "mean similarity (CKA) of an expert's copies",
    "copies_cosine": "mean cosine of an expert's copies",
}


def write_report(path: str | Path, inspections: Sequence[Inspection]) -> tuple[Path, Path]:
    """Write the self-contained page and, beside it under the same name, ``.json`` with every number on it and more.

    Args:
        path: the HTML file.
        inspections: one adapter, or several to be shown side by side.

    Returns:
        Both files.
    """
    numbers = Path(path).with_suffix(".json")
    short = [summary(found) for found in inspections]
    lines = [[label, *(_text(getattr(entry, key)) for entry in short)] for key, label in SUMMARY.items()]
    body = render(
        "inspection.html",
        summaries=[line for line in lines if {*line[1:]} != {NOTHING}],
        pages=[_page(f"a{place}", found) for place, found in enumerate(inspections, start=1)],
        dead_level=f"{100 * DEAD:g} %",
        soft_level=SOFT_LEVEL,
    )
    entries = [
        dataclasses.asdict(found) | {"summary": dataclasses.asdict(entry)}
        for found, entry in zip(inspections, short, strict=True)
    ]
    write(numbers, {"inspections": entries})
    return write_page(path, "How the experts are used", body), numbers


def _page(key: str, found: Inspection) -> dict[str, Any]:
    return {
        "key": key,
        "found": found,
        "gating": None if found.gating is None else _settings(found.gating),
        "pooled": _tables(found.pooled, "all data sets", found),
        "sets": [{"set": entry, "tables": _tables(entry, entry.name, found)} for entry in found.sets],
        "legend": [{"name": name, "colour": place % COLOURS} for place, name in enumerate(found.experts)],
        "examples": [_example(entry, found.experts) for entry in found.examples],
        "similarity": _similarity(found.similarity),
    }


def _settings(gating: dict[str, Any]) -> str:
    """A gating rule in words, without what is switched off."""
    rest = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in gating.items() if value and name != "kind")
    return f"{gating['kind']} ({rest})" if rest else str(gating["kind"])


# Gates


def _tables(found: SetStatistics, whose: str, inspection: Inspection) -> list[Table]:
    """Heat maps block x column for the block routers and for the copies of every site: mean gate, utilisation."""
    tables: list[Table] = []
    for site in dict.fromkeys(router.site for router in inspection.pooled.routers):
        routers = {router.block: router for router in found.routers if router.site == site}
        if not routers:
            continue
        of = "experts" if site is None else f"copies of {site}"
        columns = all_columns(router.columns for router in routers.values())
        highest = max(max(router.mean) for router in routers.values())
        level = max(router.level for router in routers.values())
        gates: list[list[str | Cell]] = []
        used: list[list[str | Cell]] = []
        for block in range(inspection.blocks):
            router = routers.get(block)
            gates.append([str(block), *(_cell(block, router, name, "mean", highest, of) for name in columns)])
            used.append([str(block), *(_cell(block, router, name, "used", 1.0, of) for name in columns)])
            used[-1] += _facts(router)
        caption = f"Mean gate of the {of}, {whose}. The strongest tint is {highest:.2f}."
        tables.append((caption, ["block", *columns], gates))
        caption = f"Utilisation of the {of}, {whose}: share of tokens with a gate above {level:.3g}."
        tables.append((caption, ["block", *columns, "entropy", "silent", "threshold"], used))
    return tables


def _facts(router: RouterStatistics | None) -> list[str]:
    if router is None:
        return [NOTHING] * 3
    threshold = NOTHING if router.threshold is None else "{:.3f} ± {:.3f}".format(*router.threshold)
    return [_text(router.entropy), f"{router.silent:.0%}", threshold]


def _cell(block: int, router: RouterStatistics | None, name: str, what: str, highest: float, of: str) -> Cell:
    if router is None:
        under = f"{of} under a router" if of == "experts" else of
        return Cell(NOTHING, title=f"block {block} has no {under}")
    if name not in router.columns:
        return Cell(NOTHING, title=f"block {block} has no {name}")
    at = router.columns.index(name)
    value = getattr(router, what)[at]
    text = f"{value:.2f}" if what == "mean" else f"{value:.0%}"
    title = (
        f"block {block}, {name}: mean gate {router.mean[at]:.3f}, used on {router.used[at]:.1%}, "
        f"not 0 on {router.active[at]:.1%}, strongest on {router.strongest[at]:.1%} of {router.tokens} tokens"
    )
    if name in router.dead:
        text, title = Markup("{} <strong>dead</strong>").format(text), f"{title}; dead"
    return tinted(text, value, high=highest, title=title)


# Answers


def _example(example: Example, experts: Sequence[str]) -> dict[str, Any]:
    tokens = [_visible(token) for token in example.tokens]
    whole = [entry for entry in example.strongest if entry.block is None]
    return {
        "set": example.set,
        "prompt": example.prompt,
        "whole": list(zip(tokens, _marks(whole[0], experts), strict=True)) if whole else [],
        "tokens": tokens,
        "rows": [[_name(entry), *_marks(entry, experts)] for entry in example.strongest if entry.block is not None],
    }


def _marks(entry: Strongest, experts: Sequence[str]) -> list[Cell]:
    """Who is strongest on each token, in its colour."""
    marks = []
    for name, gate in zip(entry.names, entry.gates, strict=True):
        if name is None:
            marks.append(Cell(NOTHING, title="no expert is active"))
            continue
        short = name.rpartition("/")[2]
        number = experts.index(name) if entry.site is None else int(short)
        marks.append(Cell(short, title=f"{name}, gate {gate:.2f}", colour=number % COLOURS))
    return marks


def _name(entry: Strongest) -> str:
    return f"block {entry.block}" if entry.site is None else f"block {entry.block}, copies of {entry.site}"


def _visible(token: str) -> str:
    """White space that would vanish as signs: a line break, or a token of nothing but spaces."""
    shown = token.replace("\n", "⏎")
    return shown if shown.strip() else "␣" * max(len(shown), 1)


# Similarity


def _similarity(entries: Sequence[Similarity]) -> dict[str, Any]:
    """The mean over blocks, and per block every matrix, of experts first and then of copies."""
    own = [entry for entry in entries if entry.site is None]
    blocks: dict[int, list[Table]] = {}
    for entry in entries:
        blocks.setdefault(entry.block, []).extend(_matrices(entry))
    mean = _matrix("CKA between experts, mean over blocks", *mean_over_blocks(own)) if own else None
    return {"mean": mean, "blocks": blocks}


def _matrices(entry: Similarity) -> list[Table]:
    whose = (
        f"experts of block {entry.block}" if entry.site is None else f"copies of {entry.site} in block {entry.block}"
    )
    matrices = [("CKA", entry.cka), ("Cosine", entry.cosine)]
    return [_matrix(f"{name} between the {whose}", entry.names, values) for name, values in matrices if values]


def _matrix(caption: str, names: list[str], values: Sequence[Sequence[float | None]]) -> Table:
    def cell(left: str, right: str, value: float | None) -> Cell:
        said = "not comparable, one of them puts out the same for all tokens" if value is None else f"{value:.3f}"
        return tinted(_text(value), value or 0, title=f"{left} and {right}: {said}")

    rows: list[list[str | Cell]] = [
        [left, *(cell(left, right, value) for right, value in zip(names, row, strict=True))]
        for left, row in zip(names, values, strict=True)
    ]
    return caption, ["of", *names], rows


def _text(value: float | int | None) -> str:
    if value is None:
        return NOTHING
    return str(value) if isinstance(value, int) else f"{value:.2f}"
