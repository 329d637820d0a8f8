"""A study's page: the verdicts first, then what they rest on. One HTML file without scripts; and its table as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moa.evaluation.results import write
from moa.files import write_text
from moa.report.page import render, tinted, write_page
from moa.studies.data import has
from moa.studies.methods import amount
from moa.studies.metrics import METRICS, Metric, signed


def write_report(results: Mapping[str, Any], path: Path) -> Path:
    """Write the page of `moa.studies.results.gather`'s results."""
    columns, lines = table(results["rows"])
    body = render(
        "study.html",
        results=results,
        study=results["study"],
        claims=[(claim, _numbers(claim)) for claim in results["claims"]],
        columns=columns,
        lines=lines,
        amount=amount,
        signed=signed,
        trained=[row for row in results["rows"] if row["trained_parameters"]],
        tasks=[_tasks(name, metric, results["rows"]) for name, metric in METRICS.items()],
        routing=[
            (_name(row), found, _gates(found["names"], found["blocks"]))
            for row in results["rows"]
            if (found := row["routing"])
        ],
        edges=[_name(row) for row in results["rows"] if row["rate_at_edge"]],
        diverged=[_name(row) for row in results["rows"] if row["diverged"]],
    )
    return write_page(path, results["title"], body)


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['method']} at {amount(row['budget'])}"


def _numbers(claim: Mapping[str, Any]) -> list[list[str]]:
    """The table of a claim's comparisons."""
    rows = []
    for entry in claim["comparisons"]:
        if entry["difference"] is None:
            told = ["no seed has a score for both", *[""] * 5]
        else:
            difference, low, high, *seeds = (
                signed(value, claim["unit"]) for value in (entry["difference"], *entry["interval"], *entry["by_seed"])
            )
            chances = [f"{entry['p']:.4f}", f"{entry['p_holm']:.4f}", f"{entry['p_seeds']:.3f}"]
            told = [difference, f"{low} to {high}", *chances, " ".join(seeds)]
        outcome = "not told apart" if entry["outcome"] == "open" else entry["outcome"]
        rows.append([entry["rival"], amount(entry["budget"]), *told, outcome])
    return rows


def _gates(names: Sequence[str], blocks: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The table of mean gates at the end, by block and expert."""
    return [
        [
            str(block["block"]),
            *("" if (gate := block["gate"].get(name)) is None else tinted(f"{gate:.2f}", gate) for name in names),
            _told("{:.0%}", block.get("strongest")),
            ", ".join(block["dead"]),
        ]
        for block in blocks
    ]


def _tasks(name: str, metric: Metric, rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[str], list[list[Any]]]:
    """A table of methods by tasks, each value with its tint among those of its task; without rows if none has any.

    What was learned in stages has a line for every stage: what a later one made of an earlier one's tasks.
    """
    lines = {
        _name(row) + f", after stage {stage}" * bool(row.get("stages")): sets
        for row in rows
        if row["metrics"].get(name)
        for stage, sets in enumerate([*row.get("stages", []), row["sets"]], start=1)
    }
    tasks = [task for task, data in next(iter(lines.values()), {}).items() if has(data, name)]
    found: list[list[Any]] = [[line] for line in lines]
    for task in tasks:
        values = [sets[task][name] for sets in lines.values()]
        known = [metric.sign * value for value in values if value is not None]
        for line, value in zip(found, values, strict=True):
            # Three digits are enough for colours.
            text = "" if value is None else f"{metric.factor * value:.{min(metric.digits, 3)}f}"
            line.append(text and tinted(text, metric.sign * value, min(known), max(known)))
    return f"{metric.title}; darker is better among the methods on that task.", ["", *tasks], found


def _with_interval(name: str, row: Mapping[str, Any]) -> str:
    found, metric = row["metrics"].get(name), METRICS[name]
    if found is None:
        return ""
    mean, low, high = (f"{metric.factor * value:.{metric.digits}f}" for value in (found["mean"], *found["interval"]))
    return f"{mean} ({low} to {high})"


def _told(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "method": lambda row: row["method"] + (f" ({row['diverged']} diverged)" if row["diverged"] else ""),
    "budget": lambda row: f"{row['budget']:,}",
    "parameters": lambda row: _told("{:,}", row["trained_parameters"] or None),
    "KV %": lambda row: _told("{:.1f}", None if row.get("kv_share") is None else 100 * row["kv_share"]),
    "rate": lambda row: f"{row['learning_rate']:g}" + "*" * row["rate_at_edge"] if row["trained_parameters"] else "",
    **{metric.column: partial(_with_interval, name) for name, metric in METRICS.items()},
    "ms a step": lambda row: _told("{:.0f}", row["step_seconds"] and 1000 * row["step_seconds"]),
    "MiB": lambda row: f"{row['peak_memory_mib']:.0f}",
    "active": lambda row: _told("{:.0%}", (row["routing"] or {}).get("active")),
    "entropy": lambda row: _told("{:.2f}", (row["routing"] or {}).get("entropy")),
    "dead": lambda row: "{dead:.1f} of {experts:.0f}".format(**row["routing"]) if row["routing"] else "",
}
"""What the table of all methods says about a row of the results."""


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Columns in which some row says something, and the rows as text in their order."""
    columns = {name: [say(row) for row in rows] for name, say in COLUMNS.items()}
    kept = {name: texts for name, texts in columns.items() if any(texts) or name == "method"}
    return list(kept), list(zip(*kept.values(), strict=True))


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
