"""A study's page: the verdicts first, then what they rest on. One HTML file without scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moa.report.page import render, shade, write_page
from moa.studies.results import COLUMNS, cells_of

BADGES = {"holds": "holds", "fails": "fails", "open": "not shown", "unfinished": "unfinished"}
WIDTH, LEFT, RIGHT, LINE = 760, 260, 130, 22  # of the plot, in CSS pixels


def write_report(results: Mapping[str, Any], path: Path) -> Path:
    """Write the page of `moa.studies.results.gather`'s results."""
    body = render(
        "study.html",
        results=results,
        study=results["study"],
        claims=[claim | {"badge": BADGES[claim["outcome"]], "plot": forest(claim)} for claim in results["claims"]],
        columns=COLUMNS,
        table=[cells_of(row) for row in results["rows"]],
        tasks=_tasks(results),
        routing=[row for row in results["rows"] if row["routing"]],
        edges=[f"{row['method']} at {row['budget']:,}" for row in results["rows"] if row["rate_at_edge"]],
        diverged=[f"{row['method']} at {row['budget']:,}" for row in results["rows"] if row["diverged"]],
        shade=shade,
    )
    return write_page(path, results["title"], body)


def forest(claim: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where the dots and bars of a claim's comparisons stand; None if there is nothing to draw."""
    entries = [entry for entry in claim["comparisons"] if entry["difference"] is not None]
    if not entries:
        return None
    low = min(0.0, *(entry["interval"][0] for entry in entries))
    high = max(0.0, *(entry["interval"][1] for entry in entries))
    scale = (WIDTH - LEFT - RIGHT) / ((high - low) or 1.0)

    def x(value: float) -> float:
        return round(LEFT + (value - low) * scale, 1)

    digits = 1 if claim["unit"] == "points" else 4
    marks = [
        {
            "y": LINE * (place + 1),
            "label": f"{entry['rival']} at {entry['budget']:,}",
            "low": x(entry["interval"][0]),
            "high": x(entry["interval"][1]),
            "dot": x(entry["difference"]),
            "value": f"{entry['difference']:+.{digits}f}",
            "outcome": entry["outcome"],
        }
        for place, entry in enumerate(entries)
    ]
    return {
        "width": WIDTH,
        "height": LINE * (len(entries) + 2),
        "zero": x(0.0),
        "left": LEFT,
        "right": WIDTH - RIGHT + 12,
        "marks": marks,
        "digits": digits,
    }


def _tasks(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per metric a table of methods by tasks, each value with its tint among those of its task."""
    tables = []
    for metric, (factor, digits) in {"accuracy": (100, 1), "answer_loss": (1, 3)}.items():
        rows = [row for row in results["rows"] if row["metrics"].get(metric)]
        if not rows:
            continue
        names = list(rows[0]["sets"])
        lines = []
        for row in rows:
            values = [row["sets"][name][metric] for name in names]
            tints = [
                _tint(value, [other["sets"][name][metric] for other in rows], metric)
                for name, value in zip(names, values, strict=True)
            ]
            texts = ["" if value is None else f"{factor * value:.{digits}f}" for value in values]
            lines.append(
                {"name": f"{row['method']} at {row['budget']:,}", "values": list(zip(texts, tints, strict=True))}
            )
        tables.append(
            {"metric": "accuracy, %" if metric == "accuracy" else "answer loss, nats", "names": names, "lines": lines}
        )
    return tables


def _tint(value: float | None, column: list[float | None], metric: str) -> str:
    known = [other for other in column if other is not None]
    if value is None:
        return shade(0)
    return shade(value, min(known), max(known)) if metric == "accuracy" else shade(-value, -max(known), -min(known))
