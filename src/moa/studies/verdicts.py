"""Claims against results: the paired comparison with every rival at every budget, and the verdict in words.

A method is called better (or worse) than a rival where the 95 % interval of the difference leaves out 0 and p, after
Holm's correction over all comparisons of the claim, is below 0.05. A claim holds if its method is better everywhere,
fails if it is worse anywhere, and is open otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moa.evaluation.likelihood import KINDS
from moa.studies.methods import amount
from moa.studies.statistics import LEVEL, Matrix, estimate, holm
from moa.studies.study import Claim

Scores = Mapping[tuple[str, float], Mapping[str, Matrix]]
"""(method, budget) -> task -> (seeds, items); rows of NaN where a seed has no score."""

UNITS = {
    "accuracy": (100.0, "points"),
    "choice": (100.0, "points"),
    "answer_loss": (-1.0, "nats"),
    "text_loss": (-1.0, "nats"),
}
"""What a score is multiplied with, so that more is better and differences are in the unit named."""


def has(data: Mapping[str, Any], metric: str) -> bool:
    """Whether a metric is measured on a set: of running text its loss, of answers that are one of a few the choice."""
    if data["family"] == "text" or metric == "text_loss":
        return data["family"] == "text" and metric == "text_loss"
    return metric != "choice" or data["kind"] in KINDS


def judge(claim: Claim, metric: str, budgets: list[float], scores: Scores) -> dict[str, Any]:
    """A claim with its comparisons, its outcome and its verdict, as plain data.

    Args:
        claim: what is said to be better than what.
        metric: a key of `UNITS`.
        budgets: where it is to hold.
        scores: of all methods that are finished.
    """
    pairs = [(budget, rival) for budget in budgets for rival in claim.than]
    compared = [
        {"budget": budget, "rival": rival, **_compare(scores[claim.better, budget], scores[rival, budget], metric)}
        for budget, rival in pairs
        if (claim.better, budget) in scores and (rival, budget) in scores
    ]
    for entry, p in zip(compared, holm([entry["p"] for entry in compared]), strict=True):
        entry["p_holm"] = p
        entry["outcome"] = _outcome(entry)
    missing = [
        {"budget": budget, "rival": rival}
        for budget, rival in pairs
        if (budget, rival) not in {(entry["budget"], entry["rival"]) for entry in compared}
    ]
    outcomes = [entry["outcome"] for entry in compared]
    if "worse" in outcomes:
        outcome = "fails"
    elif missing or not compared:
        outcome = "unfinished"
    else:
        outcome = "holds" if set(outcomes) == {"better"} else "open"
    found: dict[str, Any] = {"text": claim.text, "better": claim.better, "outcome": outcome, "unit": UNITS[metric][1]}
    found |= {"comparisons": compared, "missing": missing}
    return found | {"verdict": verdict(found)}


def _compare(ours: Mapping[str, Matrix], theirs: Mapping[str, Matrix], metric: str) -> dict[str, Any]:
    """Ours less theirs, over the tasks of both and the seeds at which both have scores."""
    differences = [UNITS[metric][0] * (ours[task] - theirs[task]) for task in ours]
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
        return f"Not decided yet: {_number(len(found['missing']), 'comparison')} of {better} still to be run."
    if found["outcome"] == "holds":
        least = min(compared, key=lambda entry: entry["interval"][0])
        return (
            f"Yes. {better} is better in {_all(len(compared))}; the smallest advantage is {_difference(least, found)}."
        )
    wins, losses = ([e for e in compared if e["outcome"] == outcome] for outcome in ("better", "worse"))
    still = [e for e in compared if e["outcome"] == "open"]
    if losses:
        worst = min(losses, key=lambda entry: entry["difference"])
        rest = f" It is better in {len(wins)}, and {len(still)} show no difference that can be told from chance."
        where = f"{len(losses)} of {_number(len(compared), 'comparison')}" if wins or still else _all(len(compared))
        return (
            f"No. {better} is worse in {where}; "
            f"the largest gap is {_difference(worst, found)}.{rest if wins or still else ''}"
        )
    if not wins:
        return f"Not shown. {better} cannot be told from its rivals in {_any(len(compared))}.{_range(still, found)}"
    return (
        f"Not shown in full. {better} is better in {len(wins)} of {_number(len(compared), 'comparison')}; "
        f"in the other {len(still)} no difference can be told from chance.{_range(still, found)}"
    )


def _difference(entry: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    digits = 1 if found["unit"] == "points" else 4
    low, high = entry["interval"]
    return (
        f"{entry['difference']:+.{digits}f} {found['unit']} ({low:+.{digits}f} to {high:+.{digits}f}) "
        f"against {entry['rival']} at {amount(entry['budget'])}"
    )


def _range(entries: list[Any], found: Mapping[str, Any]) -> str:
    """What the open comparisons still allow."""
    intervals = [entry["interval"] for entry in entries if entry["interval"]]
    if not intervals:
        return ""
    digits = 1 if found["unit"] == "points" else 4
    low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
    return f" Their intervals lie between {low:+.{digits}f} and {high:+.{digits}f} {found['unit']}."


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _any(count: int) -> str:
    return "the one comparison made" if count == 1 else f"any of {count} comparisons"


def _all(count: int) -> str:
    return "the one comparison made" if count == 1 else f"all {count} comparisons"
