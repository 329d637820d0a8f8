"""Finished cells to one result: a row per method and budget, the claims with their verdicts, one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from moa.evaluation.accuracy import wilson
from moa.studies import cells as grid
from moa.studies.plan import Plan, Result
from moa.studies.statistics import Matrix, estimate
from moa.studies.study import Claim, Study
from moa.studies.verdicts import Scores, has, judge


def gather(plan: Plan) -> dict[str, Any]:
    """Everything that a study found so far, as plain data.

    Methods and budgets with a cell missing are left out of rows and comparisons and counted as missing.
    """
    study = plan.study
    finished: dict[tuple[str, float], list[Result]] = {}
    rates: dict[tuple[str, float], float] = {}
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
        "versions": _versions([result for results in finished.values() for result in results]),
        "rows_digest": plan.rows.digest,
        "study": study.to_dict(),
    }


def _versions(results: list[Result]) -> dict[str, str]:
    """Of all cells; where they differ, all of them."""
    seen: dict[str, list[str]] = {}
    for result in results:
        for name, number in result["versions"].items():
            seen[name] = list(dict.fromkeys([*seen.get(name, []), number]))
    return {name: " and ".join(numbers) for name, numbers in seen.items()}


def _scores(finished: Mapping[tuple[str, float], list[Result]], metric: str) -> Scores:
    return {
        key: {name: matrix(cells, name, metric) for name, data in cells[0]["sets"].items() if has(data, metric)}
        for key, cells in finished.items()
    }


def _judged(study: Study, claim: Claim, scores: Mapping[str, Scores]) -> dict[str, Any]:
    metric = claim.metric or study.metrics[0]
    return judge(claim, metric, claim.budgets or study.budgets, scores[metric])


def matrix(results: Sequence[Result], task: str, metric: str) -> Matrix:
    """Scores (seeds, items) of a task; NaN where a run that diverged has none."""
    known = [result["sets"][task].get(metric) for result in results]
    items = next((len(scores) for scores in known if scores is not None), results[0]["sets"][task]["rows"])
    return np.array([[np.nan] * items if scores is None else scores for scores in known], dtype=float)


def _row(plan: Plan, method: str, budget: float, results: list[Result], rate: float) -> dict[str, Any]:
    rates = plan.study.rates_of(method)
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
        "kv_share": _kv_share(results),
        "stages": _stages(results, plan.study),
        "routing": _routing(results),
    }


def _kv_share(results: list[Result]) -> float | None:
    """Mean over sets and seeds; None: all of it."""
    shares = [data["kv_share"] for result in results for data in result["sets"].values() if "kv_share" in data]
    return fmean(shares) if shares else None


def _stages(results: list[Result], study: Study) -> list[dict[str, Any]]:
    """What every set scored after each stage but the last, means over the seeds; empty where nothing followed."""
    stages = zip(*(result.get("stages", []) for result in results), strict=False)
    return [{name: _set(list(same), name, study) for name in same[0]["sets"]} for same in stages]


def _metric(results: list[Result], metric: str) -> dict[str, Any] | None:
    scores = [matrix(results, task, metric) for task, data in results[0]["sets"].items() if has(data, metric)]
    sound = np.all([np.isfinite(score).all(1) for score in scores], axis=0)
    if not sound.any():
        return None
    found = estimate([score[sound] for score in scores])
    low, high = found.interval
    if metric in ("accuracy", "choice"):
        low, high = max(low, 0.0), min(high, 1.0)
    spread = stdev(found.by_seed) if len(found.by_seed) > 1 else None
    return {"mean": found.mean, "interval": [low, high], "by_seed": found.by_seed, "sd_of_seeds": spread}


def _set(results: list[Result], name: str, study: Study) -> dict[str, Any]:
    first = results[0]["sets"][name]
    means = {
        metric: float(np.nanmean(scores)) if np.isfinite(scores := matrix(results, name, metric)).any() else None
        for metric in study.metrics
    }
    return {key: first[key] for key in ("family", "kind", "chance", "rows")} | means


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
            "entropy": _entropy(states),
        }
        for states in zip(*runs, strict=True)
    ]
    last = [run[-1]["blocks"] for run in runs]
    blocks = [
        {
            "block": same[0]["block"],
            "gate": {name: fmean(block["gate"][name] for block in same) for name in same[0]["gate"]},
            "active": {name: fmean(block["active"][name] for block in same) for name in same[0]["active"]},
            "strongest": max((share for block in same for share in block.get("strongest", {}).values()), default=None),
            "dead": sorted({name for block in same for name in block["dead"]}),
        }
        for same in zip(*last, strict=True)
    ]
    return {
        "names": list(dict.fromkeys(name for block in blocks for name in block["gate"])),
        "experts": fmean(len(_all(run[-1], "active")) for run in runs),
        "active": course[-1]["active"],
        "dead": course[-1]["dead"],
        "entropy": course[-1]["entropy"],
        "course": course,
        "blocks": blocks,
    }


def _entropy(states: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over blocks and seeds, in [0, 1]; None where routers have one expert, or cells are too old to say."""
    known = [block["entropy"] for state in states for block in state["blocks"] if block.get("entropy") is not None]
    return fmean(known) if known else None


def _all(state: Mapping[str, Any], key: str) -> list[float]:
    return [value for block in state["blocks"] for value in block[key].values()]


def _at_chance(rows: list[dict[str, Any]], finished: Mapping[tuple[str, float], list[Result]]) -> list[str]:
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
