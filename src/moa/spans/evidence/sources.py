"""Where long texts with questions come from: built-in generators, JSON lines files, data sets on the hub.

What calibrates a plan must need its far context, or the search learns that far context is not needed. Rows of plain
running text do not; questions about a long document do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa.extras import extra
from moa.spans.journal import read_lines

TASKS = "tasks:"
MARGIN = 8  # tokens that a generated text may take more than its pieces, special tokens included
HELD_OUT = 5  # every fifth row of a file is kept for validation


@dataclass(frozen=True)
class Passage:
    """A text to answer a question about.

    Attributes:
        context: the text; its middle is what may be cut.
        question: what is asked about it.
        answer_tokens: most tokens of the answer; None: as many as the caller allows.
        plain: whether ``context`` is already the whole prompt, in the form that the model reads.
    """

    context: str
    question: str
    answer_tokens: int | None = None
    plain: bool = False


@dataclass(frozen=True)
class Source:
    """A source and how its rows are read.

    Attributes:
        name: ``tasks:NAME[,NAME]`` (generators of `moa.tasks.long_context`), a ``.jsonl`` file, or ``owner/name`` or
            ``owner/name:configuration`` on the hub.
        split: of a hub data set.
        context: field with the text.
        question: field with the question.
        ask: the question for all rows, instead of a field.
        seed: of the order of rows and of generated texts.
    """

    name: str
    split: str = "train"
    context: str = "context"
    question: str = "question"
    ask: str | None = None
    seed: int = 0

    def passages(self, length: int, wanted: int, count: Callable[[str], int], *, held_out: bool) -> Iterator[Passage]:
        """Passages for texts of ``length`` tokens, in a fixed order; those held out are never among the others.

        Args:
            length: tokens of prompt and answer.
            wanted: how many are going to be used; a generator makes as many.
            count: tokens of a piece of text.
            held_out: for validation.

        Raises:
            FileNotFoundError: no such file.
            ValueError: an unknown generator, or a row without the fields; names the row.
        """
        if self.name.startswith(TASKS):
            yield from self._generated(length, wanted, count, held_out)
            return
        rows = self._file() if self.name.endswith(".jsonl") or Path(self.name).exists() else self._hub()
        if not rows:
            raise ValueError(f"{self.name}: the data set is empty")
        order = list(range(len(rows)))
        random.Random(self.seed).shuffle(order)
        for place, number in enumerate(order):
            if (place % HELD_OUT == 0) == held_out:
                yield self._passage(rows[number], number)

    def _generated(self, length: int, wanted: int, count: Callable[[str], int], held_out: bool) -> Iterator[Passage]:
        from moa.tasks.long_context import generate

        names = [name.strip() for name in self.name.removeprefix(TASKS).split(",")]
        each = -(-wanted // len(names))
        # Tokens of a whole text are not exactly those of its pieces. Two seeds: for influence and for validation.
        made = [generate(name, length - MARGIN, each, count, 2 * self.seed + held_out) for name in names]
        for turn in zip(*made, strict=True):
            for row in turn:
                yield Passage(row.prompt, "", count(row.answer), plain=True)

    def _file(self) -> list[dict[str, Any]]:
        path = Path(self.name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {self.name!r} to calibrate on")
        return read_lines(path)

    def _hub(self) -> list[dict[str, Any]]:
        if self.name.count("/") != 1:
            raise ValueError(
                f"source={self.name!r} is neither {TASKS}NAME, nor a .jsonl file, nor owner/name on the hub"
            )
        with extra("train"):
            from datasets import load_dataset

        name, _, configuration = self.name.partition(":")
        return list(load_dataset(name, configuration or None, split=self.split))

    def _passage(self, row: Mapping[str, Any], number: int) -> Passage:
        wanted = [self.context] if self.ask is not None else [self.context, self.question]
        for field in wanted:
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise ValueError(
                    f"{self.name}, row {number}: the field {field!r} must hold text; the row's fields are {sorted(row)}"
                )
        return Passage(row[self.context], self.ask if self.ask is not None else row[self.question])
