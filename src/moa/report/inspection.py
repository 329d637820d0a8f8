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
from moa.report.page import render, shade, write_page

COLOURS = 8
"""Experts have one of so many colours; their names stand beside, so that a ninth may share the first one's."""

NOTHING = "–"

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
    lines = [(label, [_text(getattr(entry, key)) for entry in short]) for key, label in SUMMARY.items()]
    body = render(
        "inspection.html",
        summaries=[(label, values) for label, values in lines if set(values) != {NOTHING}],
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
    sites = list(dict.fromkeys(router.site for router in found.pooled.routers))
    return {
        "key": key,
        "found": found,
        "gating": None if found.gating is None else _settings(found.gating),
        "pooled": _tables(found.pooled, found.blocks, sites),
        "sets": [{"set": entry, "tables": _tables(entry, found.blocks, sites)} for entry in found.sets],
        "legend": [{"name": name, "colour": place % COLOURS} for place, name in enumerate(found.experts)],
        "examples": [_example(entry, found.experts) for entry in found.examples],
        "similarity": _similarity(found.similarity),
    }


def _settings(gating: dict[str, Any]) -> str:
    """A gating rule in words, without what is switched off."""
    rest = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in gating.items() if value and name != "kind")
    return f"{gating['kind']} ({rest})" if rest else str(gating["kind"])


# Gates


def _tables(found: SetStatistics, blocks: int, sites: Sequence[str | None]) -> list[dict[str, Any]]:
    """Two heat maps block x column for the block routers and for the copies of every site: mean gate, utilisation."""
    tables = []
    for site in sites:
        routers = {router.block: router for router in found.routers if router.site == site}
        columns = all_columns(router.columns for router in routers.values())
        if not columns:
            continue
        highest = max(max(router.mean) for router in routers.values())
        rows = [_row(block, routers.get(block), columns, highest, site) for block in range(blocks)]
        level = max(router.level for router in routers.values())
        tables.append(
            {"site": site, "columns": columns, "rows": rows, "highest": f"{highest:.2f}", "level": f"{level:.3g}"}
        )
    return tables


def _row(
    block: int, router: RouterStatistics | None, columns: Sequence[str], highest: float, site: str | None
) -> dict[str, Any]:
    if router is None:
        title = f"block {block} has no {'experts under a router' if site is None else f'copies of {site}'}"
        empty = [{"text": NOTHING, "style": shade(0), "title": title, "dead": False} for _ in columns]
        return {"block": block, "gates": empty, "used": empty, "facts": [NOTHING] * 3}
    places = [router.columns.index(name) if name in router.columns else None for name in columns]
    gates = [_cell(router, at, name, "mean", highest) for at, name in zip(places, columns, strict=True)]
    used = [_cell(router, at, name, "used", 1.0) for at, name in zip(places, columns, strict=True)]
    threshold = "" if router.threshold is None else "{:.3f} ± {:.3f}".format(*router.threshold)
    return {
        "block": block,
        "gates": gates,
        "used": used,
        "facts": [_text(router.entropy), f"{router.silent:.0%}", threshold or NOTHING],
    }


def _cell(router: RouterStatistics, at: int | None, name: str, what: str, highest: float) -> dict[str, Any]:
    if at is None:
        title = f"block {router.block} has no {name}"
        return {"text": NOTHING, "style": shade(0), "title": title, "dead": False}
    value = getattr(router, what)[at]
    title = (
        f"block {router.block}, {name}: mean gate {router.mean[at]:.3f}, used on {router.used[at]:.1%}, "
        f"not 0 on {router.active[at]:.1%}, strongest on {router.strongest[at]:.1%} of {router.tokens} tokens"
    )
    dead = name in router.dead
    text = f"{value:.2f}" if what == "mean" else f"{value:.0%}"
    return {"text": text, "style": shade(value, 0, highest), "title": f"{title}; dead" if dead else title, "dead": dead}


# Answers


def _example(example: Example, experts: Sequence[str]) -> dict[str, Any]:
    tokens = [_visible(token) for token in example.tokens]
    entries = [(entry, _marks(entry, tokens, experts)) for entry in example.strongest]
    whole = [marks for entry, marks in entries if entry.block is None]
    return {
        "set": example.set,
        "prompt": example.prompt,
        "whole": whole[0] if whole else None,
        "tokens": tokens,
        "rows": [{"name": _name(entry), "marks": marks} for entry, marks in entries if entry.block is not None],
    }


def _marks(entry: Strongest, tokens: Sequence[str], experts: Sequence[str]) -> list[dict[str, Any]]:
    marks = []
    for token, name, gate in zip(tokens, entry.names, entry.gates, strict=True):
        colour = None
        if name is not None:
            number = experts.index(name) if entry.site is None else int(name.rpartition("/")[2])
            colour = number % COLOURS
        said = "no expert is active" if name is None else f"{name}, gate {gate:.2f}"
        short = NOTHING if name is None else name.rpartition("/")[2]
        marks.append({"token": token, "name": short, "colour": colour, "title": said})
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
    names, mean = mean_over_blocks(own)
    blocks = []
    for block in dict.fromkeys(entry.block for entry in entries):
        here = [entry for entry in entries if entry.block == block]
        blocks.append({"block": block, "matrices": [matrix for entry in here for matrix in _matrices(entry)]})
    return {"mean": _matrix("", names, mean) if own else None, "blocks": blocks}


def _matrices(entry: Similarity) -> list[dict[str, Any]]:
    whose = (
        f"experts of block {entry.block}" if entry.site is None else f"copies of {entry.site} in block {entry.block}"
    )
    matrices = [_matrix(f"CKA between the {whose}", entry.names, entry.cka)]
    if entry.cosine is not None:
        matrices.append(_matrix(f"Cosine between the {whose}", entry.names, entry.cosine))
    return matrices


def _matrix(caption: str, names: Sequence[str], values: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    rows = []
    for left, row in zip(names, values, strict=True):
        cells = [
            {"text": _text(value), "style": shade(value or 0), "title": f"{left} and {right}: {_said(value)}"}
            for right, value in zip(names, row, strict=True)
        ]
        rows.append({"name": left, "cells": cells})
    return {"caption": caption, "names": names, "rows": rows}


def _said(value: float | None) -> str:
    return "not comparable, one of them puts out the same for all tokens" if value is None else f"{value:.3f}"


def _text(value: float | int | None) -> str:
    if value is None:
        return NOTHING
    return str(value) if isinstance(value, int) else f"{value:.2f}"
