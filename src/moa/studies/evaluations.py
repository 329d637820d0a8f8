"""Many sets at a time: each is evaluated in a process of its own, where the cells of studies run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa.evaluation.accuracy import Result
from moa.evaluation.models import load
from moa.evaluation.sets import EvaluationSet, evaluate_sets
from moa.studies.engine import Engine, Failure, Task, run_all


@dataclass(frozen=True)
class Job:
    """One set to evaluate.

    Attributes:
        data: the set.
        model: arguments of `moa.evaluation.models.load`.
        batch_size: rows per forward.
    """

    data: EvaluationSet
    model: Mapping[str, Any]
    batch_size: int


def evaluate_on(
    engine: Engine,
    sets: Sequence[EvaluationSet],
    model: Mapping[str, Any],
    *,
    batch_size: int,
    logs: Path,
    told: Callable[[], object],
) -> tuple[list[tuple[EvaluationSet, Result]], dict[str, str]]:
    """Accuracy on several sets, each in a process of its own with its own copy of the model.

    Args:
        engine: where.
        sets: what to ask.
        model: arguments of `moa.evaluation.models.load`.
        batch_size: rows per forward.
        logs: folder for what the processes print.
        told: called after each set.

    Returns:
        The outcomes in the order of ``sets``, and the model's base, template and dtype.

    Raises:
        RuntimeError: a set could not be evaluated; names the set and its log.
    """
    tasks = [Task(evaluate_one, Job(data, model, batch_size), logs / f"{data.name}.log", None, {}) for data in sets]
    outcomes: list[tuple[EvaluationSet, Result]] = []
    about: dict[str, str] = {}
    for data, found in zip(sets, run_all(tasks, engine, told), strict=True):
        if isinstance(found, Failure):
            raise RuntimeError(f"{data.name}: {found.message} ({found.log})")
        outcomes.append((data, found["result"]))
        about = found["about"]
    return outcomes, about


def evaluate_one(job: Job) -> dict[str, Any]:
    """What a process does."""
    loaded = load(**job.model)
    ((_, result),) = evaluate_sets(
        loaded.model,
        loaded.tokenizer,
        [job.data],
        template=loaded.template,
        batch_size=job.batch_size,
        progress=lambda name, rows: None,
    )
    return {"result": result, "about": loaded.about}
