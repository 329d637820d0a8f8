"""A study's page: the verdicts first, then what they rest on. One HTML file without scripts; and its table as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moa.evaluation.results import write
from moa.files import write_text
from moa.report.page import render, shade, write_page
from moa.studies.data import has
from moa.studies.methods import amount

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
            _name(row) + f", after stage {stage + 1}" * bool(row.get("stages")): sets
            for row in results["rows"]
            if row["metrics"].get(metric)
            for stage, sets in enumerate([*row.get("stages", []), row["sets"]])
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


COLUMNS = (
    *(
        "method",
        "budget",
        "parameters",
        "KV %",
        "rate",
        "accuracy %",
        "choice %",
        "answer loss",
        "text loss",
        "ms a step",
        "MiB",
    ),
    *("active", "entropy", "dead"),
)


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns in which some row says something, and the rows as text in their order."""
    texts = [cells_of(row) for row in rows]
    kept = [place for place, name in enumerate(COLUMNS) if any(text[place] for text in texts) or not place]
    return [COLUMNS[place] for place in kept], [[text[place] for place in kept] for text in texts]


def cells_of(row: Mapping[str, Any]) -> list[str]:
    """One row of the table as text, in the order of `COLUMNS`."""
    routing, trained, metrics = row["routing"], row["trained_parameters"], row["metrics"]
    return [
        row["method"] + (f" ({row['diverged']} diverged)" if row["diverged"] else ""),
        f"{row['budget']:,}",
        f"{trained:,}" if trained else "",
        "" if row.get("kv_share") is None else f"{100 * row['kv_share']:.1f}",
        f"{row['learning_rate']:g}" + ("*" if row["rate_at_edge"] else "") if trained else "",
        _with_interval(metrics.get("accuracy"), 100, 1),
        _with_interval(metrics.get("choice"), 100, 1),
        _with_interval(metrics.get("answer_loss"), 1, 4),
        _with_interval(metrics.get("text_loss"), 1, 4),
        "" if row["step_seconds"] is None else f"{1000 * row['step_seconds']:.0f}",
        f"{row['peak_memory_mib']:.0f}",
        "" if routing is None else f"{routing['active']:.0%}",
        "" if routing is None or routing.get("entropy") is None else f"{routing['entropy']:.2f}",
        "" if routing is None else f"{routing['dead']:.1f} of {routing['experts']:.0f}",
    ]


def _with_interval(found: Mapping[str, Any] | None, factor: float, digits: int) -> str:
    if found is None:
        return ""
    low, high = found["interval"]
    return f"{factor * found['mean']:.{digits}f} ({factor * low:.{digits}f} to {factor * high:.{digits}f})"


def write_results(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``results.json`` and ``results.md`` into ``folder``."""
    write(folder / "results.json", results)
    write_text(folder / "results.md", markdown(results))


def markdown(results: Mapping[str, Any]) -> str:
    """The verdicts and the table, as Markdown."""
    lines = [f"# {results['title']}", ""]
    for claim in results["claims"]:
        lines += [f"**{claim['text']}**", "", claim["verdict"], ""]
    columns, rows = table(results["rows"])
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
