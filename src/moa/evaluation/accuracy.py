"""Greedy accuracy of a model on rows with gold answers.

Contract: every row gets the same number of new tokens, whatever shares its batch; results come in the order of the
rows. Prompts are never cut: one that does not fit into the model's context is left unanswered, counts as wrong and
is reported. Decoding is plain greedy: sampling, penalties and length limits of the model's own generation settings
are switched off.

Limits: batches differ in floating-point rounding from single rows, so in half precision a near-tie may fall the
other way; in float32 this was never seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moa.data.templates import prompt_of
from moa.data.tokens import prompt_text
from moa.evaluation.answers import extract, is_correct, kind_of, wanted_of
from moa.evaluation.generation import generate
from moa.extras import extra

# A model that did not stop goes on with a task of its own making, which is not its answer. "#### 42" is one, though.
_HEADING = re.compile(r"(?<!#)### ")


@dataclass(frozen=True)
class Item:
    """One row's outcome; ``text`` and ``answer`` are None where there is none."""

    prompt: str
    gold: str
    text: str | None
    answer: str | None
    correct: bool


@dataclass(frozen=True)
class Result:
    """The outcome on one data set.

    Attributes:
        kind: kind of the set's answers, which decides the extraction rule.
        items: one `Item` per row, in the order of the rows.
    """

    kind: str
    items: list[Item]

    @property
    def accuracy(self) -> float:
        """Share of correct rows, in [0, 1]."""
        return sum(item.correct for item in self.items) / len(self.items)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson(sum(item.correct for item in self.items), len(self.items))

    @property
    def too_long(self) -> int:
        """How many prompts did not fit into the model's context; they count as wrong."""
        return sum(item.text is None for item in self.items)


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    template: str,
    kind: str | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
) -> Result:
    """Let the model answer every row greedily and compare with the gold answers.

    Args:
        model: a causal language model, with or without an adapter; put into evaluation mode for the duration.
        tokenizer: the model's tokenizer.
        rows: from `moa.data.load_rows`: an instruction, a prompt or messages, and an answer or output.
        template: name of the prompt template the model was trained with.
        kind: kind of the answers, see `moa.evaluation.answers`; None finds it out from the gold answers.
        max_new_tokens: how long an answer may be.
        batch_size: rows per forward.
        progress: called with the number of rows just finished, after each batch.

    Raises:
        ValueError: no rows, an unknown template, or a row without a prompt or a gold answer of its kind.
    """
    if not rows:
        raise ValueError("nothing to evaluate: the data set has no rows")
    golds = [gold_of(row) for row in rows]
    kind = kind or kind_of(golds)
    for gold in golds:
        wanted_of(kind, gold)
    prompts = [prompt_of(row, template) for row in rows]
    read = [prompt_text(tokenizer, prompt) for prompt in prompts]
    texts: list[str | None] = [None] * len(rows)
    for places, answers in generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size):
        for place, answer in zip(places, answers, strict=True):
            texts[place] = answer
        if progress is not None:
            progress(len(places))
    headed = [isinstance(prompt, str) for prompt in prompts]
    return Result(kind, [_judge(kind, *item) for item in zip(read, golds, texts, headed, strict=True)])


def gold_of(row: Mapping[str, Any]) -> str:
    """A row's gold answer; its whole output, or the last message of a chat, where the source has no answers."""
    return str(row.get("answer") or row["output"]).strip()


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share; unlike the normal one it holds near 0 and 1 and for few rows."""
    with extra("train"):
        from scipy.stats import binomtest
    low, high = binomtest(correct, n).proportion_ci(method="wilson")
    return float(low), float(high)


def _judge(kind: str, prompt: str, gold: str, text: str | None, headed: bool) -> Item:
    """``headed``: the template has headings of its own, which no answer has; a chat's answer may."""
    if text is None:
        return Item(prompt, gold, None, None, False)
    answer = _HEADING.split(text, maxsplit=1)[0] if headed else text
    return Item(prompt, gold, text, extract(kind, answer), is_correct(kind, answer, gold))
