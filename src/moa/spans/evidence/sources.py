"""Where long texts with questions come from: built-in generators, text files, JSON lines files, data sets on the hub.

What calibrates a plan must need its far context, or the search learns that far context is not needed. Rows of plain
running text do not; questions about a long document do.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa.assets import base_path
from moa.extras import extra
from moa.files import read_text
from moa.spans.journal import read_lines

FACTS = "facts:"
TASKS = "tasks:"
MARGIN = 8  # tokens that a generated text may take more than its pieces, special tokens included
HELD_OUT = 5  # every fifth row of a file, and the last fifth of a text, is kept for validation
SPARE = 4  # texts with facts for every one that is wanted: those without a right answer are passed over


@dataclass(frozen=True)
class Turn:
    """A question about a text.

    Attributes:
        question: what is asked; empty if the context asks.
        start: how every answer begins; given to the model.
        answer: what has to follow, where that is known.
    """

    question: str
    start: str = ""
    answer: str | None = None


@dataclass(frozen=True)
class Passage:
    """A text to answer questions about.

    Attributes:
        context: the text; its middle is what may be cut.
        turns: questions about it. The model answers the first; several are for passages whose answers are all known.
        answer_tokens: most tokens of the answer; None: as many as the caller allows.
        plain: whether ``context`` is already the whole prompt, in the form that the model reads.
    """

    context: str
    turns: tuple[Turn, ...]
    answer_tokens: int | None = None
    plain: bool = False


@dataclass(frozen=True)
class Source:
    """A source and how its rows are read.

    Attributes:
        source: ``facts:`` or ``facts:FILE`` (`moa.tasks.facts`, hidden in the built-in text or in one's own),
            ``tasks:NAME[,NAME]`` (generators of `moa.tasks.long_context`), a ``.jsonl`` file, or ``owner/name`` or
            ``owner/name:configuration`` on the hub.
        split: of a hub data set.
        context: field with the text.
        question: field with the question.
        ask: the question for all rows, instead of a field.
        answer: field with the right answer, if there is one; only counted, never trained on.
        start: how every answer begins; given to the model.
        seed: of the order of rows and of generated texts.
    """

    source: str
    split: str = "train"
    context: str = "context"
    question: str = "question"
    ask: str | None = None
    answer: str | None = None
    start: str = ""
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
        if self.source.startswith(TASKS):
            yield from self._generated(length, wanted, count, held_out)
            return
        if self.source.startswith(FACTS):
            yield from self._facts(length, wanted, count, held_out)
            return
        rows = self._file() if self.source.endswith(".jsonl") or Path(self.source).exists() else self._hub()
        if not rows:
            raise ValueError(f"{self.source}: the data set is empty")
        order = list(range(len(rows)))
        random.Random(self.seed).shuffle(order)
        for place, number in enumerate(order):
            if (place % HELD_OUT == 0) == held_out:
                yield self._passage(rows[number], number)

    def _generated(self, length: int, wanted: int, count: Callable[[str], int], held_out: bool) -> Iterator[Passage]:
        from moa.tasks.long_context import generate

        names = [name.strip() for name in self.source.removeprefix(TASKS).split(",")]
        each = -(-wanted // len(names))
        # Tokens of a whole text are not exactly those of its pieces. Two seeds: for influence and for validation.
        made = [generate(name, length - MARGIN, each, count, 2 * self.seed + held_out) for name in names]
        for rows in zip(*made, strict=True):
            for row in rows:
                yield Passage(row.prompt, (Turn("", answer=row.answer.strip()),), count(row.answer), plain=True)

    def _facts(self, length: int, wanted: int, count: Callable[[str], int], held_out: bool) -> Iterator[Passage]:
        from moa.tasks.facts import fact_texts

        text = self._text()
        cut = len(text) - len(text) // HELD_OUT
        made = fact_texts(text[cut:] if held_out else text[:cut], length, count, f"{self.seed}/{held_out}")
        for one in itertools.islice(made, SPARE * wanted):
            yield Passage(one.context, tuple(Turn(asked.question, asked.start, asked.answer) for asked in one.asked))

    def _text(self) -> str:
        if not (name := self.source.removeprefix(FACTS)):
            return (base_path("embedded-long") / "held_out.txt").read_text(encoding="utf-8")
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no file {name!r} to hide facts in; {FACTS} alone takes the built-in text"
            )
        return read_text(path)

    def _file(self) -> list[dict[str, Any]]:
        path = Path(self.source).expanduser()
        return read_lines(path)

    def _hub(self) -> list[dict[str, Any]]:
        if self.source.count("/") != 1:
            raise ValueError(
                f"source={self.source!r} is neither {FACTS}[FILE], nor {TASKS}NAME, nor a .jsonl file, nor "
                "owner/name on the hub"
            )
        with extra("train"):
            from datasets import load_dataset

        name, _, configuration = self.source.partition(":")
        return list(load_dataset(name, configuration or None, split=self.split))

    def _passage(self, row: Mapping[str, Any], number: int) -> Passage:
        wanted = [self.context] if self.ask is not None else [self.context, self.question]
        wanted += [self.answer] if self.answer is not None else []
        for field in wanted:
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise ValueError(
                    f"{self.source}, row {number}: the field {field!r} must hold text; "
                    f"the row's fields are {sorted(row)}"
                )
        asked = self.ask if self.ask is not None else row[self.question]
        known = row[self.answer] if self.answer is not None else None
        return Passage(row[self.context], (Turn(asked, self.start, known),))
