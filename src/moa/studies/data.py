"""Rows of a study, drawn once: what is learned, what chooses learning rates, what is asked at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from moa.data import load_rows, prompt_tokens
from moa.evaluation.likelihood import KINDS
from moa.evaluation.retrieval import LONG, TEXT, TextSet, is_long, long_rows, text_set
from moa.evaluation.sets import EvaluationSet, load_all
from moa.files import write_text
from moa.models import tokenizer_of
from moa.studies.study import StudyData

Tested = EvaluationSet | TextSet

_TEST_SEED = 1000  # apart from those of calibration texts, which come from the same generators


@dataclass(frozen=True)
class Rows:
    """Attributes:
    stages: rows to learn, in the common form of `moa.data`; later stages follow on the first.
    validation: held out from the sources of all stages; none is in ``stages``.
    sets: the test sets.
    texts: running text.
    """

    stages: list[list[dict[str, Any]]]
    validation: list[dict[str, Any]]
    sets: list[EvaluationSet]
    texts: list[TextSet]

    @property
    def tested(self) -> list[Tested]:
        """All that is measured at the end."""
        return [*self.sets, *self.texts]

    @cached_property
    def digest(self) -> str:
        """Changes with any row."""
        parts: list[Any] = [self.stages[0], self.validation, [asdict(data) for data in self.sets]]
        if later := [*self.stages[1:], *(asdict(data) for data in self.texts)]:
            parts.append(later)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def training_files(self, folder: Path) -> list[Path]:
        """The training rows of every stage as a ``.jsonl`` file in ``folder``, for recipes to name."""
        files = [folder / f"train-{self.digest}{f'-{n}' * bool(n)}.jsonl" for n in range(len(self.stages))]
        for file, rows in zip(files, self.stages, strict=True):
            if not file.exists():
                write_text(file, "".join(json.dumps(_as_file(row)) + "\n" for row in rows))
        return files


def load(data: StudyData, base: str, *, trains: bool = True) -> Rows:
    """Draw the rows.

    Args:
        data: what to draw.
        base: the base model, whose tokenizer measures long texts.
        trains: whether anything is learned; otherwise there are no rows but those of the test sets.

    Raises:
        ValueError: unusable rows, too few for a validation split, or test rows among the training rows.
        FileNotFoundError: no such file or folder.
    """
    sets, texts = _tested(data, base)
    if not trains:
        return Rows([[]], [], sets, texts)
    found = [
        (stage, row) for stage, sources in enumerate([data.train, *data.then]) for row in _rows(data, base, sources)
    ]
    if any("messages" in row for _, row in found):
        raise ValueError("data.train holds chat messages: a study needs rows with instructions or prompts")
    held: dict[str, dict[str, Any]] = {}
    for _, row in found:  # equal questions stay on one side of the split
        held.setdefault(_question(row), row)
    questions = list(held)
    if len(questions) <= data.validation_rows:
        raise ValueError(
            f"data.validation_rows={data.validation_rows} leaves nothing to learn: data.train has {len(questions)} rows"
        )
    # Spread over the whole draw, since several sources follow each other.
    chosen = {questions[place * len(questions) // data.validation_rows] for place in range(data.validation_rows)}
    for tested in sets:
        if shared := sum(_question(row) in held for row in tested.rows):
            raise ValueError(f"{shared} of the {len(tested.rows)} test rows of {tested.name!r} are in data.train, too")
    stages = [
        [row for place, row in found if place == stage and _question(row) not in chosen]
        for stage in range(1 + len(data.then))
    ]
    if not all(stages):
        raise ValueError(f"data.then: a stage of {data.then} has no rows left to learn")
    return Rows(stages, [row for question, row in held.items() if question in chosen], sets, texts)


def _as_file(row: dict[str, Any]) -> dict[str, Any]:
    """A row in a form that `load_rows` reads as the same row."""
    return row | {"completion": row["output"]} if "prompt" in row else row


def _rows(data: StudyData, base: str, sources: Sequence[str]) -> list[dict[str, Any]]:
    if wrong := [source for source in sources if source.startswith(TEXT)]:
        raise ValueError(f"{wrong[0]!r} is running text, which can be measured on (data.test) but not learned")
    limits = {"limit": data.train_rows, "seed": data.seed}
    return [
        row
        for source in sources
        for row in (
            long_rows(_tokenizer(base), source, data.train_rows or 1000, data.seed)
            if is_long(source)
            else load_rows(source, split="train", **limits)  # type: ignore[arg-type]
        )
    ]


def _tested(data: StudyData, base: str) -> tuple[list[EvaluationSet], list[TextSet]]:
    rows = data.test_rows or 100
    plain = [source for source in data.test if not is_long(source)]
    sets = load_all(plain, limit=data.test_rows, seed=data.seed, max_new_tokens=data.max_new_tokens)
    for source in data.test:
        if source.startswith(LONG):
            tokenizer, name = _tokenizer(base), source.removeprefix(LONG).replace("@", "-")
            asked = long_rows(tokenizer, source, rows, _TEST_SEED + data.seed)
            longest = max(len(tokenizer(row["output"], add_special_tokens=False)["input_ids"]) for row in asked)
            sets.append(EvaluationSet(name, "long", "begins", None, longest, asked))
    texts = [text_set(source, rows) for source in data.test if source.startswith(TEXT)]
    for one in texts:
        if (have := len(prompt_tokens(_tokenizer(base), one.text))) < one.length:
            raise ValueError(f"data.test: {one.name}: {have} tokens of text make no window of {one.length}")
    names = [*(one.name for one in sets), *(one.name for one in texts)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"data.test has two sets called {twice.pop()!r}")
    return sets, texts


def about(data: Tested) -> dict[str, Any]:
    """What a cell's file says about a set."""
    if isinstance(data, TextSet):
        return {"family": "text", "kind": "text", "chance": None, "rows": data.windows}
    return {"family": data.family, "kind": data.kind, "chance": data.chance, "rows": len(data.rows)}


def has(told: Mapping[str, Any], metric: str) -> bool:
    """Whether a metric is measured on a set, by what `about` says: of running text its loss, of answers
    that are one of a few the choice.
    """
    if (told["family"] == "text") != (metric == "text_loss"):
        return False
    return metric != "choice" or told["kind"] in KINDS


@cache
def _tokenizer(base: str) -> Any:
    return tokenizer_of(base)


def _question(row: dict[str, Any]) -> str:
    return str(row.get("prompt") or f"{row['instruction']}\n{row.get('input', '')}").strip()
