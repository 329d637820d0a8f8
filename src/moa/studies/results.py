"""Finished cells to one result: a row per method and budget, the claims with their verdicts, one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

import numpy as np

from moa.evaluation.accuracy import wilson
from moa.inspection.summary import known_mean
from moa.studies import cells as grid
from moa.studies.cells import Rates
from moa.studies.data import has
from moa.studies.metrics import METRICS
from moa.studies.plan import Plan, Result, versions_of
from moa.studies.statistics import Matrix, estimate
from moa.studies.study import Study
from moa.studies.verdicts import judge


def gather(plan: Plan) -> dict[str, Any]:
    """Everything that a study found so far, as plain data.

    Methods and budgets with a cell missing are left out of rows and comparisons and counted as missing.
    """
    study = plan.study
    finished: dict[tuple[str, float], list[Result]] = {}
    rates: Rates = {}
    missing = 0
    for method in study.methods:
        own = plan.rates([method])
        done = {} if own is None else plan.finished(grid.tests(study, [method], own))
        rates |= own or {}
        for budget in study.budgets_of(method):
            results = [result for cell, result in done.items() if cell.budget == budget]
            missing += len(study.seeds) - len(results)
            if len(results) == len(study.seeds):
                finished[method, budget] = results
    scores = {
        metric: {key: _matrices(results, metric) for key, results in finished.items()} for metric in study.metrics
    }
    decisive = [(claim, claim.metric or study.metrics[0]) for claim in study.claims]
    rows = [_row(plan, *key, results, rates[key]) for key, results in finished.items()]
    return {
        "title": study.title,
        "note": study.note,
        "metric": study.metrics[0],
        "claims": [judge(claim, by, claim.budgets or study.budgets, scores[by]) for claim, by in decisive],
        "rows": rows,
        "at_chance": _at_chance(rows),
        "missing_cells": missing,
        "tries": len(study.tuning.learning_rates) * len(study.tuning.seeds),
        "versions": {
            name: " and ".join(numbers)
            for name, numbers in versions_of(one for results in finished.values() for one in results).items()
        },
        "rows_digest": plan.rows.digest,
        "study": asdict(study),
    }


def _matrices(results: Sequence[Result], metric: str) -> dict[str, Matrix]:
    """Scores of every task that has them."""
    return {name: _matrix(results, name, metric) for name, data in results[0]["sets"].items() if has(data, metric)}


def _matrix(results: Sequence[Result], task: str, metric: str) -> Matrix:
    """Scores (seeds, items) of a task; NaN where a run that diverged has none, one a seed if all of them have."""
    known = [result["sets"][task].get(metric) for result in results]
    # How many windows a text gives, only runs that have read it know.
    items = next((len(scores) for scores in known if scores is not None), 1)
    return np.array([[np.nan] * items if scores is None else scores for scores in known], dtype=float)


def _row(plan: Plan, method: str, budget: float, results: list[Result], rate: float) -> dict[str, Any]:
    study, fitted = plan.study, plan.fits[method, budget]
    rates = study.rates_of(method)
    return {
        "method": method,
        "note": study.methods[method].note,
        "budget": budget,
        "trained_parameters": fitted.trained,
        "sizes": fitted.sizes,
        "learning_rate": rate,
        "rate_at_edge": len(rates) > 1 and rate in (min(rates), max(rates)),
        "diverged": sum(result["diverged"] is not None for result in results),
        "metrics": {metric: _metric(results, metric) for metric in study.metrics},
        "sets": _sets(results, study),
        "step_seconds": known_mean(result["step_seconds"] for result in results),
        "peak_memory_mib": max(result["peak_memory_mib"] for result in results),
        "kv_share": known_mean(data.get("kv_share") for result in results for data in result["sets"].values()),
        # What every set scored after each stage but the last; empty where nothing followed.
        "stages": [_sets(same, study) for same in zip(*(result.get("stages", []) for result in results), strict=False)],
        "routing": _routing(results),
    }


def _metric(results: list[Result], metric: str) -> dict[str, Any] | None:
    scores = list(_matrices(results, metric).values())
    sound = np.all([np.isfinite(score).all(1) for score in scores], axis=0)
    if not sound.any():
        return None
    found = estimate([score[sound] for score in scores])
    low, high = found.interval
    if METRICS[metric].unit == "points":
        low, high = max(low, 0.0), min(high, 1.0)
    spread = stdev(found.by_seed) if len(found.by_seed) > 1 else None
    return {"mean": found.mean, "interval": [low, high], "by_seed": found.by_seed, "sd_of_seeds": spread}


def _sets(results: Sequence[Result], study: Study) -> dict[str, dict[str, Any]]:
    """What every set scored, means over the seeds."""
    return {
        name: {key: data[key] for key in ("family", "kind", "chance", "rows")}
        | {
            metric: float(np.nanmean(scores)) if np.isfinite(scores := _matrix(results, name, metric)).any() else None
            for metric in study.metrics
        }
        for name, data in results[0]["sets"].items()
    }


def _routing(results: list[Result]) -> dict[str, Any] | None:
    """Utilisation over seeds: its course through training, and every block at the end."""
    runs = [result["routing"] for result in results if result["routing"]]
    if not runs:
        return None
    course = []
    for states in zip(*runs, strict=True):
        seen = [block for state in states for block in state["blocks"]]
        course.append(
            {
                "step": states[0]["step"],
                "active": fmean(share for block in seen for share in block["active"].values()),
                "dead": sum(len(block["dead"]) for block in seen) / len(runs),
                # None where routers have one expert, or cells are too old to say.
                "entropy": known_mean(block.get("entropy") for block in seen),
            }
        )
    blocks = [
        {
            "block": same[0]["block"],
            "gate": _means(same, "gate"),
            "active": _means(same, "active"),
            "strongest": max((share for block in same for share in block.get("strongest", {}).values()), default=None),
            "dead": sorted({name for block in same for name in block["dead"]}),
        }
        for same in zip(*(run[-1]["blocks"] for run in runs), strict=True)
    ]
    return {
        "names": list(dict.fromkeys(name for block in blocks for name in block["gate"])),
        "experts": sum(len(block["active"]) for run in runs for block in run[-1]["blocks"]) / len(runs),
        **{key: course[-1][key] for key in ("active", "dead", "entropy")},
        "course": course,
        "blocks": blocks,
    }


def _means(blocks: Sequence[Mapping[str, Any]], key: str) -> dict[str, float]:
    return {name: fmean(block[key][name] for block in blocks) for name in blocks[0][key]}


def _at_chance(rows: list[dict[str, Any]]) -> list[str]:
    """Sets on which not even the best method can be told from guessing."""
    found = []
    for name, first in rows[0]["sets"].items() if rows else []:
        shares = [row["sets"][name]["accuracy"] for row in rows if row["sets"][name].get("accuracy") is not None]
        if shares and first["chance"] is not None:
            low, _ = wilson(round(max(shares) * first["rows"]), first["rows"])
            found += [name] if low <= first["chance"] else []
    return found
