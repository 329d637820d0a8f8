"""Data sets to evaluate on: where their rows come from, which family they belong to, how long an answer may be."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa.data.rows import bundled_tasks, load_rows
from moa.evaluation.accuracy import Result, evaluate, gold_of
from moa.evaluation.answers import kind_of
from moa.tasks import TASKS

# The sets of the paper's two tables, as their folders and hub names are spelt, less everything but letters.
PUBLISHED = {
    "math": ("addsub", "aqua", "gsmk", "multiarith", "singleeq", "svamp", "mawps", "mathqa"),
    "commonsense": (
        *("boolq", "piqa", "socialiqa", "siqa", "hellaswag", "winogrande", "openbookqa", "obqa"),
        *("arc", "arceasy", "arcchallenge"),
    ),
}
ANSWER_TOKENS = {"number": 256, "choice": 256, "json": 256, "text": 256, "bool": 40, "label": 40}


@dataclass(frozen=True)
class EvaluationSet:
    """A data set, ready to evaluate on.

    Attributes:
        name: the bundled task, or the last part of the source.
        family: "math", "commonsense", or "other" for sets that neither the suite nor the paper has.
        kind: kind of the answers, see `moa.evaluation.answers`.
        chance: accuracy of guessing in [0, 1]; None where it is not known.
        max_new_tokens: how long an answer may be.
        rows: rows in the common form of `moa.data`.
    """

    name: str
    family: str
    kind: str
    chance: float | None
    max_new_tokens: int
    rows: list[dict[str, Any]]


def load_sets(source: str, *, limit: int | None = None, seed: int = 0) -> list[EvaluationSet]:
    """The test rows of a source; ``tasks:`` sources give one set per task.

    Args:
        source: as for `moa.data.load_rows`.
        limit: at most so many rows of each set, drawn at random with ``seed``.
        seed: of the draw, and of the bundled tasks.

    Raises:
        ValueError: unusable rows or an unknown task.
        FileNotFoundError: no such file or folder.
    """
    names = source.removeprefix("tasks:")
    if names == source:
        return [_published(source, load_rows(source, split="test", limit=limit, seed=seed))]
    return [
        _bundled(task, load_rows(f"tasks:{task}", split="test", limit=limit, seed=seed))
        for task in bundled_tasks(names)
    ]


def load_all(
    sources: Sequence[str], *, limit: int | None = None, seed: int = 0, max_new_tokens: int | None = None
) -> list[EvaluationSet]:
    """The sets of several sources, see `load_sets`.

    Args:
        sources: as for `load_sets`.
        limit: rows of each set.
        seed: of the draw of rows.
        max_new_tokens: how long an answer may be; None: by the kind of the answers.

    Raises:
        ValueError: as `load_sets`, or two sets of one name.
        FileNotFoundError: as `load_sets`.
    """
    sets: dict[str, EvaluationSet] = {}
    for found in [found for source in sources for found in load_sets(source, limit=limit, seed=seed)]:
        if found.name in sets:
            raise ValueError(f"two data sets are called {found.name!r}: evaluate them one after the other")
        longest = max_new_tokens or found.max_new_tokens
        sets[found.name] = dataclasses.replace(found, max_new_tokens=longest)
    return list(sets.values())


def evaluate_sets(
    model: Any,
    tokenizer: Any,
    sets: Sequence[EvaluationSet],
    *,
    template: str,
    batch_size: int,
    progress: Callable[[str, int], object],
) -> list[tuple[EvaluationSet, Result]]:
    """Accuracy on several sets; ``progress`` is called with a set's name and the rows just finished."""
    outcomes = []
    for data in sets:
        progress(data.name, 0)
        result = evaluate(
            model,
            tokenizer,
            data.rows,
            template=template,
            kind=data.kind,
            max_new_tokens=data.max_new_tokens,
            batch_size=batch_size,
            progress=lambda rows, name=data.name: progress(name, rows),  # type: ignore[misc]
        )
        outcomes.append((data, result))
    return outcomes


def _bundled(name: str, rows: list[dict[str, Any]]) -> EvaluationSet:
    task = TASKS[name]
    return EvaluationSet(name, task.family, task.kind, task.chance, task.answer_tokens, rows)


def _published(source: str, rows: list[dict[str, Any]]) -> EvaluationSet:
    local = Path(source).expanduser()
    path = local.resolve() if local.exists() else Path(source.partition(":")[0])  # hub names end in :CONFIGURATION
    name = path.stem if path.suffix in (".json", ".jsonl") else path.name
    name = (path.parent.name if name in ("test", "train") else name).removeprefix("eval_")
    family = next((f for f, known in PUBLISHED.items() if any(_is(one, name) for one in known)), "other")
    kind = kind_of(gold_of(row) for row in rows)
    return EvaluationSet(name, family, kind, None, ANSWER_TOKENS[kind], rows)


def _is(known: str, name: str) -> bool:
    """Whether a name begins with a published set's: "ARC-Challenge" and "gsm8k_test" do, an "archive" does not."""
    return re.match("[^a-z]*" + "[^a-z]*".join(known) + "(?![a-z])", name.lower()) is not None
