"""A study's page: the verdicts first, then what they rest on. One HTML file without scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moa.report.page import render, shade, write_page
from moa.studies.methods import amount
from moa.studies.results import has, table

BADGES = {"holds": "holds", "fails": "fails", "open": "not shown", "unfinished": "unfinished"}
WIDTH, LEFT, RIGHT, LINE = 760, 260, 130, 22  # of the plot, in CSS pixels


def write_report(results: Mapping[str, Any], path: Path) -> Path:
    """Write the page of `moa.studies.results.gather`'s results."""
    columns, lines = table(results["rows"])
    body = render(
        "study.html",
        results=results,
        study=results["study"],
        claims=[claim | {"badge": BADGES[claim["outcome"]], "plot": forest(claim)} for claim in results["claims"]],
        columns=columns,
        table=lines,
        amount=amount,
        trained=[row for row in results["rows"] if row["trained_parameters"]],
        tasks=_tasks(results),
        routing=[row for row in results["rows"] if row["routing"]],
        edges=[_name(row) for row in results["rows"] if row["rate_at_edge"]],
        diverged=[_name(row) for row in results["rows"] if row["diverged"]],
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
            "label": f"{entry['rival']} at {amount(entry['budget'])}",
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


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['method']} at {amount(row['budget'])}"


_UNITS = {
    "accuracy": ("accuracy, %", 100, 1),
    "choice": ("most likely choice right, %", 100, 1),
    "answer_loss": ("answer loss, nats", 1, 3),
    "text_loss": ("loss on running text, nats", 1, 3),
}


def _tasks(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per metric a table of methods by tasks, each value with its tint among those of its task.

    What was learned in stages has a line for every stage: what a later one made of an earlier one's tasks.
    """
    tables = []
    for metric, (title, factor, digits) in _UNITS.items():
        lines = {
            _name(row) + f", after stage {stage + 1}" * bool(row["stages"]): sets
            for row in results["rows"]
            if row["metrics"].get(metric)
            for stage, sets in enumerate([*row["stages"], row["sets"]])
        }
        if not lines:
            continue
        names = [name for name, data in next(iter(lines.values())).items() if has(data, metric)]
        columns = {name: [sets[name][metric] for sets in lines.values()] for name in names}
        table = [
            {
                "name": line,
                "values": [
                    (
                        "" if sets[name][metric] is None else f"{factor * sets[name][metric]:.{digits}f}",
                        _tint(sets[name][metric], columns[name], metric),
                    )
                    for name in names
                ],
            }
            for line, sets in lines.items()
        ]
        tables.append({"metric": title, "names": names, "lines": table})
    return tables


def _tint(value: float | None, column: list[float | None], metric: str) -> str:
    known = [other for other in column if other is not None]
    if value is None:
        return shade(0)
    return (
        shade(value, min(known), max(known))
        if metric in ("accuracy", "choice")
        else shade(-value, -max(known), -min(known))
    )
