"""Facts hidden in running text, several in one text and all of them asked for: what a long context must not lose.

Contract: `fact_texts(text, length, count, seed)` yields an endless, reproducible series of conversations about parts of
``text``. Each hides `FACTS` sentences at random places among its sentences and asks for each of them once, in another
order. Every answer is a number of four digits, all of a text's are different, and the answer's beginning is given
(`Asked.start`), so that the first token which the model must produce is the number's.

Running text of any kind will do; it has to be a few times as long as ``length``, or texts repeat themselves. The form
is that of needles in a haystack (Kamradt 2023) with several needles (RULER, Hsieh et al. 2024); the wording is our own.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["FACTS", "Asked", "FactText", "fact_texts"]

FACTS = 4
ROOMS = "library kitchen garage attic cellar office workshop stable chapel theatre bakery laundry".split()  # noqa: SIM905
NAMES = "Martha Edward Louise Henry Agnes Walter Edith George Bertha Arthur Flora Hugh".split()  # noqa: SIM905
TOWNS = "Bergen Lyon Porto Ghent Turin Basel Krakow Malaga Graz Cork Leeds Bremen".split()  # noqa: SIM905
Form = tuple[Sequence[str], str, str, str]
"""Keys, the sentence, the question, and how the answer begins."""
FORMS: tuple[Form, ...] = (
    (ROOMS, "The access code of the {} is {}.", "What is the access code of the {}?", "The access code of the {} is"),
    (NAMES, "{} has collected {} stamps.", "How many stamps has {} collected?", "{} has collected"),
    (
        TOWNS,
        "The train to {} has number {}.",
        "Which number has the train to {}?",
        "The train to {} has number",
    ),
)
LONGEST = 200  # tokens of a sentence; longer ones, such as tables, are left out
TURN = 16  # tokens that a chat template may put around a question and its answer


@dataclass(frozen=True)
class Asked:
    """One question.

    Attributes:
        question: what is asked.
        start: how the answer begins, without a blank at its end.
        answer: what has to follow, without a blank before it.
    """

    question: str
    start: str
    answer: str


@dataclass(frozen=True)
class FactText:
    """A text and what is asked about it.

    Attributes:
        context: running text with the facts in it.
        asked: one question for each fact, in another order than that of the text.
    """

    context: str
    asked: tuple[Asked, ...]


def fact_texts(
    text: str, length: int, count: Callable[[str], int], seed: int | str = 0, forms: Sequence[Form] = FORMS
) -> Iterator[FactText]:
    """An endless series of texts with facts.

    Args:
        text: running text to hide facts in.
        length: most tokens of a conversation: context, questions, answers and a chat template around them.
        count: tokens of a piece of text.
        seed: another seed draws other texts.
        forms: of the facts, taken in turn; another wording tests what was calibrated on this one.

    Raises:
        ValueError: too few sentences of text, or a length without room for the facts and some text between them.
    """
    parts = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text) if part.strip()]
    measured = [(part, count(f" {part}")) for part in parts]
    sentences, costs = [p for p, n in measured if n <= LONGEST], [max(n, 1) for _, n in measured if n <= LONGEST]
    if len(sentences) < FACTS:
        raise ValueError(
            f"a text of {len(text)} characters with {len(sentences)} sentences of at most {LONGEST} tokens is too "
            "short to hide facts in"
        )
    rng = random.Random(f"facts/{length}/{seed}")
    for turn in itertools.count():
        keys, fact, question, start = forms[turn % len(forms)]
        values = map(str, rng.sample(range(1000, 10_000), FACTS))
        facts = list(zip(rng.sample(keys, FACTS), values, strict=True))
        hidden = [fact.format(*pair) for pair in facts]
        asked = [Asked(question.format(key), start.format(key), value) for key, value in facts]
        rng.shuffle(asked)
        room = length - sum(count(f" {part}") for part in hidden) - TURN
        room -= sum(count(f"{one.question} {one.start} {one.answer}.") + TURN for one in asked)
        body = [sentences[place] for place in _stretch(costs, rng.randrange(len(sentences)), room)]
        if len(body) < FACTS:
            raise ValueError(f"length={length} has no room for {FACTS} facts, their questions and text between them")
        for place, part in zip(sorted(rng.sample(range(len(body) + 1), FACTS), reverse=True), hidden, strict=True):
            body.insert(place, part)
        yield FactText(" ".join(body), tuple(asked))


def _stretch(costs: list[int], start: int, room: int) -> list[int]:
    """Places of neighbouring sentences from ``start`` on that fit, from the first again after the last."""
    found: list[int] = []
    for place in itertools.islice(itertools.cycle(range(len(costs))), start, None):
        room -= costs[place]
        if room < 0:
            break
        found.append(place)
    return found
