"""`moa spans profile` on several processes or machines: each measures some items; the sum is made here, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa.spans.evidence.influence import influence
from moa.spans.evidence.items import Item
from moa.studies.engine import Engine, Failure, Task, run_all
from moa.training.base import load_base

TOGETHER = 4
"""Items that a process measures, so that it loads the model once for several, and a lost machine costs few."""


@dataclass(frozen=True)
class Job:
    """Some items to measure.

    Attributes:
        base: name or folder of the model.
        dtype: of its weights.
        items: by the file that each one's influence goes to.
        length: tokens.
        block: tokens per block.
    """

    base: str
    dtype: str
    items: dict[Path, Item]
    length: int
    block: int


def measure_on(
    engine: Engine,
    base: str,
    dtype: str,
    items: Mapping[int, Item],
    length: int,
    block: int,
    *,
    folder: Path,
    told: Callable[[int], object],
) -> dict[int, Path]:
    """Measure every item's influence apart, in processes with their own copies of the model.

    Args:
        engine: where.
        base: name or folder of the model.
        dtype: of its weights.
        items: texts by their places, as `moa.spans.evidence.influence.influence` takes them.
        length: tokens.
        block: tokens per block.
        folder: for a file per item, which a run that was stopped goes on from, and for logs.
        told: called with the number of finished items, after every few.

    Returns:
        What `influence` asks of ``elsewhere``.

    Raises:
        RuntimeError: items could not be measured; names the log.
    """
    parts = {place: folder / f"length-{length}-item-{place}.safetensors" for place in items}
    places = sorted(items)
    groups = [places[first : first + TOGETHER] for first in range(0, len(places), TOGETHER)]
    tasks = [
        Task(
            measure,
            Job(base, dtype, {parts[place]: items[place] for place in group}, length, block),
            folder / f"length-{length}-items-{group[0]}-{group[-1]}.log",
            None,
            {},
        )
        for group in groups
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for found in run_all(tasks, engine, lambda: told(sum(path.exists() for path in parts.values()))):
        if isinstance(found, Failure):
            raise RuntimeError(f"influence at length {length}: {found.message} ({found.log})")
    return parts


def measure(job: Job) -> dict[str, Any]:
    """What a process does."""
    model, _ = load_base(job.base, job.dtype, device_map="auto")
    for path, item in job.items.items():
        influence(model.eval(), [item], job.length, job.block, save_to=path)
    return {}
