"""What a bundled task is, and how its rows are drawn.

Contract: rows are generated, never stored. The split of a row is decided by a hash of its `key` (the
question's content: the operands, the list, the fact, the people), so no key is ever in both splits,
whatever the seed or `n`. The same arguments give the same rows on every machine and in every process.

Limits: a task can only give as many rows as its world has distinct questions; asking for more is an
error, not a repetition.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

Family = Literal["math", "commonsense", "extraction"]
Kind = Literal["number", "choice", "bool", "text", "json"]
T = TypeVar("T")

SPLITS = ("train", "test")
LETTERS = "ABCD"
TEST_SHARE = 5  # one key in five belongs to the test split
_PATIENCE = 1000  # draws without a new row after which a task counts as exhausted


@dataclass(frozen=True)
class Draw:
    """One sampled question: `key` decides the split, `output` is the text to train on."""

    key: str
    instruction: str
    output: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A bundled task.

    Attributes:
        name: its key in `moa.tasks.TASKS`.
        family: "math", "commonsense" or "extraction".
        kind: what the answer is: "number" (digits), "choice" (a letter A to D), "bool" ("true" or
            "false"), "text" (a name, a phrase or a list, compared as a whole) or "json" (an object).
        chance: accuracy in [0, 1] of guessing among the answers the question itself offers.
        sample: draws one question for a split from a `random.Random`.
        answer_tokens: how many tokens an answer may take.
    """

    name: str
    family: Family
    kind: Kind
    chance: float
    sample: Callable[[random.Random, str], Draw]
    answer_tokens: int = 40  # the longest answer of the suite takes 31 tokens of the embedded base

    def generate(self, split: str, n: int, seed: int = 0) -> list[dict[str, str]]:
        """`n` distinct rows of one split; see `moa.tasks.generate`."""
        rows = self.draw(split, n, seed)
        if len(rows) < n:
            raise ValueError(f"task {self.name!r} has only about {len(rows)} distinct {split} rows; {n} asked")
        return rows

    def draw(self, split: str, n: int, seed: int = 0) -> list[dict[str, str]]:
        """As `generate`, but fewer rows where the task has no more (as far as many draws can tell)."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; valid splits: {', '.join(SPLITS)}")
        if n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        rows: dict[str, Draw] = {}
        misses = 0
        while len(rows) < n and misses < _PATIENCE:
            draw = self.sample(rng, split)
            if split_of(draw.key) == split and draw.instruction not in rows:
                rows[draw.instruction] = draw
                misses = 0
            else:
                misses += 1
        return [
            {"instruction": d.instruction, "input": "", "output": d.output, "answer": d.answer} for d in rows.values()
        ]


def split_of(key: str) -> str:
    """The split, "train" or "test", that a question's content belongs to (stable across processes)."""
    digest = hashlib.sha256(key.encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") % TEST_SHARE == 0 else "train"


def members(items: Sequence[T], split: str, key: Callable[[T], str]) -> list[T]:
    """The items whose key belongs to the split, in their given order."""
    return [item for item in items if split_of(key(item)) == split]


def lettered(options: Sequence[str]) -> str:
    """`A) red B) blue ...` for up to four options."""
    return " ".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
