"""Claims against results: the paired comparison with every rival at every budget, and the verdict in words.

A method is called better (or worse) than a rival where the 95 % interval of the difference leaves out 0 and p, after
Holm's correction over all comparisons of the claim, is below 0.05. A claim holds if its method is better everywhere,
fails if it is worse anywhere, and is open otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

from moa.studies.methods import amount
from moa.studies.metrics import METRICS, signed
from moa.studies.statistics import LEVEL, Matrix, estimate, holm
from moa.studies.study import Claim

Scores = Mapping[tuple[str, float], Mapping[str, Matrix]]
"""(method, budget) -> task -> (seeds, items); rows of NaN where a seed has no score."""


def judge(claim: Claim, metric: str, budgets: list[float], scores: Scores) -> dict[str, Any]:
    """A claim with its comparisons, its outcome and its verdict, as plain data.

    Args:
        claim: what is said to be better than what.
        metric: a key of `METRICS`.
        budgets: where it is to hold.
        scores: of all methods that are finished.
    """
    compared: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = []
    for budget, rival in product(budgets, claim.than):
        where = {"budget": budget, "rival": rival}
        ours, theirs = scores.get((claim.better, budget)), scores.get((rival, budget))
        if ours is None or theirs is None:
            missing.append(where)
        else:
            compared.append(where | _compare(ours, theirs, metric))
    for entry, p in zip(compared, holm([entry["p"] for entry in compared]), strict=True):
        entry["p_holm"] = p
        entry["outcome"] = _outcome(entry)
    outcomes = {entry["outcome"] for entry in compared}
    if "worse" in outcomes:
        outcome = "fails"
    elif missing or not compared:
        outcome = "unfinished"
    else:
        outcome = "holds" if outcomes == {"better"} else "open"
    found = {
        "text": claim.text,
        "better": claim.better,
        "outcome": outcome,
        "unit": METRICS[metric].unit,
        "comparisons": compared,
        "missing": missing,
    }
    return found | {"verdict": verdict(found)}


def _compare(ours: Mapping[str, Matrix], theirs: Mapping[str, Matrix], metric: str) -> dict[str, Any]:
    """How much better ours are, over the tasks of both and the seeds at which both have scores."""
    factor = METRICS[metric].sign * METRICS[metric].factor
    differences = [factor * (ours[task] - theirs[task]) for task in ours]
    sound = np.all([np.isfinite(difference).all(1) for difference in differences], axis=0)
    if not sound.any():
        return {"seeds": 0, "difference": None, "interval": None, "p": 1.0, "p_seeds": 1.0, "by_seed": []}
    found = estimate([difference[sound] for difference in differences])
    return {
        "seeds": int(sound.sum()),
        "difference": found.mean,
        "interval": list(found.interval),
        "p": found.p,
        "p_seeds": found.p_seeds,
        "by_seed": found.by_seed,
    }


def _outcome(entry: Mapping[str, Any]) -> str:
    if entry["difference"] is None or entry["p_holm"] >= 1 - LEVEL:
        return "open"
    low, high = entry["interval"]
    return "better" if low > 0 else "worse" if high < 0 else "open"


def verdict(found: Mapping[str, Any]) -> str:
    """What to say about a judged claim, in one or two plain sentences."""
    better, compared = found["better"], found["comparisons"]
    if found["outcome"] == "unfinished":
        return f"Not decided yet: {_number(len(found['missing']))} of {better} still to be run."
    if found["outcome"] == "holds":
        least = min(compared, key=lambda entry: entry["interval"][0])
        return (
            f"Yes. {better} is better in {_of('all', compared)}; "
            f"the smallest advantage is {_difference(least, found['unit'])}."
        )
    wins, losses, still = ([e for e in compared if e["outcome"] == outcome] for outcome in ("better", "worse", "open"))
    if losses:
        worst = min(losses, key=lambda entry: entry["difference"])
        rest = f" It is better in {len(wins)}, and {len(still)} show no difference that can be told from chance."
        where = f"{len(losses)} of {_number(len(compared))}" if wins or still else _of("all", compared)
        return (
            f"No. {better} is worse in {where}; "
            f"the largest gap is {_difference(worst, found['unit'])}.{rest if wins or still else ''}"
        )
    possible = _range(still, found["unit"])
    if not wins:
        return f"Not shown. {better} cannot be told from its rivals in {_of('any of', compared)}.{possible}"
    return (
        f"Not shown in full. {better} is better in {len(wins)} of {_number(len(compared))}; "
        f"in the other {len(still)} no difference can be told from chance.{possible}"
    )


def _difference(entry: Mapping[str, Any], unit: str) -> str:
    low, high = entry["interval"]
    return (
        f"{signed(entry['difference'], unit)} {unit} ({signed(low, unit)} to {signed(high, unit)}) "
        f"against {entry['rival']} at {amount(entry['budget'])}"
    )


def _range(entries: list[Any], unit: str) -> str:
    """What the open comparisons still allow."""
    intervals = [entry["interval"] for entry in entries if entry["interval"]]
    if not intervals:
        return ""
    low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
    return f" Their intervals lie between {signed(low, unit)} and {signed(high, unit)} {unit}."


def _number(count: int) -> str:
    return f"{count} comparison{'' if count == 1 else 's'}"


def _of(which: str, compared: list[Any]) -> str:
    return "the one comparison made" if len(compared) == 1 else f"{which} {_number(len(compared))}"
