"""Finished cells to one result: a row per method and budget, the claims with their verdicts, one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from moa.evaluation.accuracy import wilson
from moa.evaluation.results import write
from moa.studies import cells as grid
from moa.studies.claims import Claim
from moa.studies.conduct import Plan, Result
from moa.studies.statistics import Matrix, estimate
from moa.studies.study import Study
from moa.studies.verdicts import Scores, judge


def gather(plan: Plan) -> dict[str, Any]:
    """Everything that a study found so far, as plain data.

    Methods and budgets with a cell missing are left out of rows and comparisons and counted as missing.
    """
    study = plan.study
    finished: dict[tuple[str, int], list[Result]] = {}
    rates: dict[tuple[str, int], float] = {}
    missing = 0
    for method in study.methods:
        own = plan.rates([method])
        if own is None:
            missing += len(study.budgets_of(method)) * len(study.seeds)
            continue
        rates |= own
        done = plan.finished(grid.tests(study, [method], own))
        for budget in study.budgets_of(method):
            results = [result for cell, result in done.items() if cell.budget == budget]
            missing += len(study.seeds) - len(results)
            if len(results) == len(study.seeds):
                finished[method, budget] = results
    scores = {metric: _scores(finished, metric) for metric in study.metrics}
    rows = [_row(plan, *key, results, rates[key]) for key, results in finished.items()]
    return {
        "title": study.title,
        "note": study.note,
        "metric": study.metrics[0],
        "claims": [_judged(study, claim, scores) for claim in study.claims],
        "rows": rows,
        "at_chance": _at_chance(rows, finished),
        "missing_cells": missing,
        "tries": len(study.tuning.learning_rates) * len(study.tuning.seeds),
        "versions": next((results[0]["versions"] for results in finished.values()), {}),
        "rows_digest": plan.rows.digest,
        "study": study.to_dict(),
    }


def _scores(finished: Mapping[tuple[str, int], list[Result]], metric: str) -> Scores:
    return {key: {name: matrix(cells, name, metric) for name in cells[0]["sets"]} for key, cells in finished.items()}


def _judged(study: Study, claim: Claim, scores: Mapping[str, Scores]) -> dict[str, Any]:
    metric = claim.metric or study.metrics[0]
    return judge(claim, metric, claim.budgets or study.budgets, scores[metric])


def matrix(results: Sequence[Result], task: str, metric: str) -> Matrix:
    """Scores (seeds, items) of a task; NaN where a run that diverged has none."""
    rows = results[0]["sets"][task]["rows"]
    return np.array([result["sets"][task].get(metric, [np.nan] * rows) for result in results], dtype=float)


def _row(plan: Plan, method: str, budget: int, results: list[Result], rate: float) -> dict[str, Any]:
    rates = plan.study.tuning.learning_rates
    steps = [result["step_seconds"] for result in results if result["step_seconds"]]
    fitted = plan.fits[method, budget]
    return {
        "method": method,
        "note": plan.study.methods[method].note,
        "budget": budget,
        "trained_parameters": fitted.trained,
        "sizes": fitted.sizes,
        "learning_rate": rate,
        "rate_at_edge": len(rates) > 1 and rate in (min(rates), max(rates)),
        "diverged": sum(result["diverged"] is not None for result in results),
        "metrics": {metric: _metric(results, metric) for metric in plan.study.metrics},
        "sets": {name: _set(results, name, plan.study) for name in results[0]["sets"]},
        "step_seconds": fmean(steps) if steps else None,
        "peak_memory_mib": max(result["peak_memory_mib"] for result in results),
        "routing": _routing(results),
    }


def _metric(results: list[Result], metric: str) -> dict[str, Any] | None:
    scores = [matrix(results, task, metric) for task in results[0]["sets"]]
    sound = np.all([np.isfinite(score).all(1) for score in scores], axis=0)
    if not sound.any():
        return None
    found = estimate([score[sound] for score in scores])
    low, high = found.interval
    if metric == "accuracy":
        low, high = max(low, 0.0), min(high, 1.0)
    spread = stdev(found.by_seed) if len(found.by_seed) > 1 else None
    return {"mean": found.mean, "interval": [low, high], "by_seed": found.by_seed, "sd_of_seeds": spread}


def _set(results: list[Result], name: str, study: Study) -> dict[str, Any]:
    first = results[0]["sets"][name]
    means = {
        metric: float(np.nanmean(scores)) if np.isfinite(scores := matrix(results, name, metric)).any() else None
        for metric in study.metrics
    }
    return {key: first[key] for key in ("family", "chance", "rows")} | means


def _routing(results: list[Result]) -> dict[str, Any] | None:
    """Utilisation over seeds: its course through training, and every block at the end."""
    runs = [result["routing"] for result in results if result["routing"]]
    if not runs:
        return None
    course = [
        {
            "step": states[0]["step"],
            "active": fmean(share for state in states for share in _all(state, "active")),
            "dead": fmean(sum(len(block["dead"]) for block in state["blocks"]) for state in states),
        }
        for states in zip(*runs, strict=True)
    ]
    last = [run[-1]["blocks"] for run in runs]
    blocks = [
        {
            "block": same[0]["block"],
            "gate": {name: fmean(block["gate"][name] for block in same) for name in same[0]["gate"]},
            "active": {name: fmean(block["active"][name] for block in same) for name in same[0]["active"]},
            "dead": sorted({name for block in same for name in block["dead"]}),
        }
        for same in zip(*last, strict=True)
    ]
    return {
        "names": list(dict.fromkeys(name for block in blocks for name in block["gate"])),
        "experts": fmean(len(_all(run[-1], "active")) for run in runs),
        "active": course[-1]["active"],
        "dead": course[-1]["dead"],
        "course": course,
        "blocks": blocks,
    }


def _all(state: Mapping[str, Any], key: str) -> list[float]:
    return [value for block in state["blocks"] for value in block[key].values()]


def _at_chance(rows: list[dict[str, Any]], finished: Mapping[tuple[str, int], list[Result]]) -> list[str]:
    """Sets on which not even the best method can be told from guessing."""
    found = []
    for name in next(iter(rows), {"sets": {}})["sets"]:
        sets = [row["sets"][name] for row in rows if row["sets"][name].get("accuracy") is not None]
        if not sets or sets[0]["chance"] is None:
            continue
        best = max(one["accuracy"] for one in sets)
        if wilson(round(best * sets[0]["rows"]), sets[0]["rows"])[0] <= sets[0]["chance"]:
            found.append(name)
    return found


COLUMNS = ("method", "budget", "parameters", "rate", "accuracy %", "answer loss", "ms a step", "MiB", "active", "dead")


def cells_of(row: Mapping[str, Any]) -> list[str]:
    """One row of the table as text, in the order of `COLUMNS`."""
    accuracy, loss = (row["metrics"].get(metric) for metric in ("accuracy", "answer_loss"))
    routing = row["routing"]
    return [
        row["method"] + (f" ({row['diverged']} diverged)" if row["diverged"] else ""),
        f"{row['budget']:,}",
        f"{row['trained_parameters']:,}",
        f"{row['learning_rate']:g}" + ("*" if row["rate_at_edge"] else ""),
        _with_interval(accuracy, 100, 1),
        _with_interval(loss, 1, 4),
        "" if row["step_seconds"] is None else f"{1000 * row['step_seconds']:.0f}",
        f"{row['peak_memory_mib']:.0f}",
        "" if routing is None else f"{routing['active']:.0%}",
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
    draft = folder / ".results.md.part"
    draft.write_text(markdown(results), encoding="utf-8")
    draft.replace(folder / "results.md")


def markdown(results: Mapping[str, Any]) -> str:
    """The verdicts and the table, as Markdown."""
    lines = [f"# {results['title']}", ""]
    for claim in results["claims"]:
        lines += [f"**{claim['text']}**", "", claim["verdict"], ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(cells_of(row)) + " |" for row in results["rows"]]
    return "\n".join(lines) + "\n"
