"""Rows of a study, drawn once: what is learned, what chooses learning rates, what is asked at the end."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moa.data import load_rows
from moa.evaluation.sets import EvaluationSet, load_all
from moa.studies.study import StudyData


@dataclass(frozen=True)
class Rows:
    """Attributes:
    train: rows in the common form of `moa.data`.
    validation: held out from the training sources; none is in ``train``.
    sets: the test sets.
    """

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    sets: list[EvaluationSet]

    @cached_property
    def digest(self) -> str:
        """Changes with any row."""
        text = json.dumps([self.train, self.validation, [asdict(data) for data in self.sets]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def write_training_file(self, folder: Path) -> Path:
        """The training rows as a ``.jsonl`` file in ``folder``, for recipes to name."""
        file = folder / f"train-{self.digest}.jsonl"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(".part")
            draft.write_text("".join(json.dumps(row) + "\n" for row in self.train), encoding="utf-8")
            draft.replace(file)
        return file


def load(data: StudyData) -> Rows:
    """Draw the rows.

    Raises:
        ValueError: unusable rows, too few for a validation split, or test rows among the training rows.
        FileNotFoundError: no such file or folder.
    """
    found = [
        row for source in data.train for row in load_rows(source, split="train", limit=data.train_rows, seed=data.seed)
    ]
    if any("messages" in row for row in found):
        raise ValueError("data.train holds chat messages: a study needs rows with instructions or prompts")
    held: dict[str, list[dict[str, Any]]] = {}
    for row in found:  # equal questions stay on one side of the split
        held.setdefault(_question(row), []).append(row)
    questions = list(held)
    if len(questions) <= data.validation_rows:
        raise ValueError(
            f"data.validation_rows={data.validation_rows} leaves nothing to learn: data.train has {len(questions)} rows"
        )
    # Spread over the whole draw, since several sources follow each other.
    chosen = {questions[place * len(questions) // data.validation_rows] for place in range(data.validation_rows)}
    sets = load_all(data.test, limit=data.test_rows, seed=data.seed, max_new_tokens=data.max_new_tokens)
    for tested in sets:
        if shared := sum(_question(row) in held for row in tested.rows):
            raise ValueError(f"{shared} of the {len(tested.rows)} test rows of {tested.name!r} are in data.train, too")
    return Rows(
        [row for row in found if _question(row) not in chosen],
        [held[question][0] for question in questions if question in chosen],
        sets,
    )


def _question(row: dict[str, Any]) -> str:
    return str(row.get("prompt") or f"{row['instruction']}\n{row.get('input', '')}").strip()
