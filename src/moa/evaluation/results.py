"""Result files: everything that was measured, and everything one needs to measure it again."""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from moa.evaluation.accuracy import Result
from moa.evaluation.sets import EvaluationSet
from moa.files import write_text
from moa.versions import versions

PACKAGES = ("torch", "transformers", "peft")

Outcome = tuple[EvaluationSet, Result]


def family_means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Unweighted mean accuracy of every family's sets, and of all sets under "all"."""
    families = dict.fromkeys(data.family for data, _ in outcomes)
    means = {family: fmean(r.accuracy for data, r in outcomes if data.family == family) for family in families}
    return means | {"all": fmean(result.accuracy for _, result in outcomes)}


def as_json(outcomes: Sequence[Outcome], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, means and every row's outcome as plain data."""
    return {
        "settings": dict(settings),
        "command": shlex.join(["moa", *sys.argv[1:]]),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(*PACKAGES) | {"python": platform.python_version()},
        "mean_accuracy": family_means(outcomes),
        "sets": {data.name: _set_as_json(data, result) for data, result in outcomes},
    }


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result file, creating its folder; it appears whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _set_as_json(data: EvaluationSet, result: Result) -> dict[str, Any]:
    return {
        "family": data.family,
        "kind": data.kind,
        "chance": data.chance,
        "max_new_tokens": data.max_new_tokens,
        "rows": len(result.items),
        "accuracy": result.accuracy,
        "interval_95": result.interval,
        "too_long": result.too_long,
        "items": [dataclasses.asdict(item) for item in result.items],
    }
