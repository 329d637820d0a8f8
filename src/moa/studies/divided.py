"""Work on one model divided among processes, where the cells of studies run: sets of `moa eval`, items of profiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moa.evaluation.accuracy import Result
from moa.evaluation.models import load
from moa.evaluation.sets import EvaluationSet, evaluate_sets
from moa.spans.evidence.influence import influence
from moa.spans.evidence.items import Item
from moa.studies.engine import Engine, Task, run_whole
from moa.training.base import load_base

TOGETHER = 4
"""Items that a process measures, so that it loads the model once for several, and a lost machine costs few."""

Evaluated = tuple[list[tuple[EvaluationSet, Result]], dict[str, str]]
"""Outcomes in the order of the sets, and the model's base, template and dtype."""


def evaluate_on(
    engine: Engine,
    sets: Sequence[EvaluationSet],
    model: Mapping[str, Any],
    *,
    batch_size: int,
    logs: Path,
    told: Callable[[], object],
) -> Evaluated:
    """Accuracy on several sets, each in a process of its own with its own copy of the model.

    Args:
        engine: where.
        sets: what to ask.
        model: arguments of `moa.evaluation.models.load`.
        batch_size: rows per forward.
        logs: folder for what the processes print.
        told: called after each set.

    Raises:
        RuntimeError: a set could not be evaluated; names the set and its log.
    """
    tasks = [Task(partial(_evaluate, data, model, batch_size), logs / f"{data.name}.log") for data in sets]
    found = run_whole(tasks, engine, told)
    return [outcome for outcomes, _ in found for outcome in outcomes], found[-1][1]


def _evaluate(data: EvaluationSet, model: Mapping[str, Any], batch_size: int) -> Evaluated:
    loaded = load(**model)
    outcomes = evaluate_sets(
        loaded.model,
        loaded.tokenizer,
        [data],
        template=loaded.template,
        batch_size=batch_size,
        progress=lambda name, rows: None,
    )
    return outcomes, loaded.about


def measure_on(
    engine: Engine,
    base: str,
    dtype: str,
    items: Sequence[Item],
    length: int,
    block: int,
    left: range,
    *,
    folder: Path,
    told: Callable[[int], object],
) -> dict[int, Path]:
    """Measure every item's influence apart, in processes with their own copies of the model.

    Args:
        engine: where.
        base: name or folder of the model.
        dtype: of its weights.
        items: texts, as `moa.spans.evidence.influence.influence` takes them.
        length: tokens.
        block: tokens per block.
        left: the places of the items to measure.
        folder: for a file per item, which a run that was stopped goes on from, and for logs.
        told: called with the number of finished items, those before ``left`` among them, after every few.

    Returns:
        What `influence` asks of ``elsewhere``.

    Raises:
        RuntimeError: items could not be measured; names the log.
    """
    parts = {place: folder / f"length-{length}-item-{place}.safetensors" for place in left}
    groups = [left[first : first + TOGETHER] for first in range(0, len(left), TOGETHER)]
    tasks = [
        Task(
            partial(_measure, base, dtype, {parts[place]: items[place] for place in group}, length, block),
            folder / f"length-{length}-items-{group[0]}-{group[-1]}.log",
        )
        for group in groups
    ]
    folder.mkdir(parents=True, exist_ok=True)
    run_whole(tasks, engine, lambda: told(left.start + sum(path.exists() for path in parts.values())))
    return parts


def _measure(base: str, dtype: str, items: dict[Path, Item], length: int, block: int) -> None:
    model, _ = load_base(base, dtype, device_map="auto")
    for path, item in items.items():
        influence(model.eval(), [item], length, block, save_to=path)
