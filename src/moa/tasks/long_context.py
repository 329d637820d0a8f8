"""Long-context tasks of any length: line retrieval, needle retrieval, copying; and filler text.

Contract: `generate(task, length, n, count, seed)` gives `n` prompts, each at most `length` tokens with its answer as
`count` measures them, and less than one line, sentence or word short of it. The answer follows from the prompt alone
and from one place in it; the place is uniform over the prompt. The same arguments give the same prompts on every
machine.

The tasks are in the image of LongEval's line retrieval (Li et al. 2023, "How long can open-source LLMs truly promise
on context length?"), of the needle in a haystack (Kamradt 2023) and of the copying task (Graves et al. 2014); the
wording is our own and short, so that a very small model with a small vocabulary can learn it. Scores compare with no
published number.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ADJECTIVES", "LONG_TASKS", "NOUNS", "LongPrompt", "generate", "story"]

ADJECTIVES = (  # noqa: SIM905
    "red old new big wet dry hot cold dark pale blue gray pink warm soft hard loud calm wild tame slow fast kind rude "
    "thin wide deep tall flat rich poor sick glad mild keen bold vain shy raw rare"
).split()
NOUNS = (  # noqa: SIM905
    "cat dog cow pig hen fox owl bat ant bee fish frog crow swan goat mule wolf bear lion deer toad seal crab moth "
    "wasp newt hare duck dove lamb mole worm slug clam hawk wren lynx elk ram ox"
).split()
_VERBS = "saw met left heard found liked feared followed watched knew".split()  # noqa: SIM905
_PLACES = "in the house|on the hill|by the river|at the door|near the wood|under the tree|on the road".split("|")  # noqa: SIM905
_TIMES = "In the morning|At night|One day|Then|After that|A little later|In the end".split("|")  # noqa: SIM905
COPIED = 16  # words to be copied
CUE = 4  # words that say from where


@dataclass(frozen=True)
class LongPrompt:
    """A question about a long text.

    Attributes:
        prompt: what the model reads.
        answer: what it has to say next, from its first blank on.
        depth: where in the prompt the answer is found, 0 (start) to 1 (end).
    """

    prompt: str
    answer: str
    depth: float


Count = Callable[[str], int]


def line(key: tuple[str, str], value: str) -> str:
    """One entry of a record, `" red cat 4716."`."""
    return f" {key[0]} {key[1]} {value}."


def keys(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """`n` different pairs of an adjective and a noun; of two adjectives and a noun where those do not suffice.

    Raises:
        ValueError: for more than there are.
    """
    adjectives = list(ADJECTIVES)
    if n > len(adjectives) * len(NOUNS):
        adjectives = [f"{one} {other}" for one in ADJECTIVES for other in ADJECTIVES]
    if n > (most := len(adjectives) * len(NOUNS)):
        raise ValueError(f"a record has at most {most} different lines, {n} asked")
    return [(adjectives[i // len(NOUNS)], NOUNS[i % len(NOUNS)]) for i in rng.sample(range(most), n)]


def value(rng: random.Random) -> str:
    """Four digits."""
    return f"{rng.randrange(10_000):04}"


def story(rng: random.Random) -> str:
    """One sentence of filler text: its words depend on their neighbours, never on a sentence further back."""
    who, whom = (f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2))
    deed = f"{rng.choice(_VERBS)} {whom}"
    form = rng.randrange(4)
    if form == 0:
        return f" {rng.choice(_TIMES)} {who} {deed} {rng.choice(_PLACES)}."
    if form == 1:
        return f" It was {who} that {deed}."
    if form == 2:
        return f" {who.capitalize()} {deed} and went away."
    return f" {who.capitalize()}, who was {rng.choice(_PLACES)}, {deed}."


def lines(rng: random.Random, length: int, count: Count) -> LongPrompt:
    """A record of lines; one of its keys is asked for."""
    most = length // count(line(("red", "cat"), "1000")) + 2
    entries = [(key, value(rng)) for key in keys(rng, most)]
    asked = rng.random()
    budget = length - count("Record:") - count(_question(entries[0][0])) - count(" 1000")
    kept = _fitting([line(*entry) for entry in entries], budget, count)
    place = int(asked * kept)
    record = "".join(line(*entry) for entry in entries[:kept])
    key, answer = entries[place]
    return LongPrompt("Record:" + record + _question(key), " " + answer, (place + 0.5) / kept)


def needle(
    rng: random.Random, length: int, count: Count, sentence: Callable[[random.Random], str] = story
) -> LongPrompt:
    """A single fact somewhere in filler text; the fact is asked for."""
    (key,), answer, place = keys(rng, 1), value(rng), rng.random()
    fact = " Note:" + line(key, answer)
    budget = length - count("Text:") - count(fact) - count(_question(key)) - count(" 1000")
    filler: list[str] = []
    while budget > 0:
        filler.append(sentence(rng))
        budget -= count(filler[-1])
    filler.pop()
    at = round(place * len(filler))
    text = "".join([*filler[:at], fact, *filler[at:]])
    return LongPrompt("Text:" + text + _question(key), " " + answer, at / max(len(filler), 1))


def copying(rng: random.Random, length: int, count: Count) -> LongPrompt:
    """A text of random words; `CUE` of them in a row are given, the next `COPIED` are to follow.

    No two neighbours stand together twice (as long as the words suffice, about 6000 of them), so that any two words
    say where one is.
    """
    words = _walk(rng, length)
    place = rng.random()
    budget = length - count("Text:") - count(" Copy:") - sum(map(count, words[: CUE + COPIED]))
    kept = max(_fitting(words, budget, count), CUE + COPIED)
    at = int(place * (kept - CUE - COPIED + 1))
    cue, copied = "".join(words[at : at + CUE]), "".join(words[at + CUE : at + CUE + COPIED])
    return LongPrompt("Text:" + "".join(words[:kept]) + " Copy:" + cue, copied, at / kept)


def _walk(rng: random.Random, n: int) -> list[str]:
    """`n` words, each with a blank before it, in which no pair of neighbours recurs."""
    vocabulary = [f" {word}" for word in (*ADJECTIVES, *NOUNS)]
    followers = {word: rng.sample(vocabulary, len(vocabulary)) for word in vocabulary}
    words = [rng.choice(vocabulary)]
    while len(words) < n:
        words.append(followers[words[-1]].pop() if followers[words[-1]] else rng.choice(vocabulary))
    return words


LONG_TASKS: dict[str, Callable[[random.Random, int, Count], LongPrompt]] = {
    "lines": lines,
    "needle": needle,
    "copying": copying,
}
SHORTEST = 64  # tokens, below which no task has room


def generate(task: str, length: int, n: int, count: Count, seed: int = 0) -> list[LongPrompt]:
    """Prompts of one task and one length.

    Args:
        task: a key of `LONG_TASKS`.
        length: most tokens of a prompt with its answer.
        n: how many prompts.
        count: tokens of a piece of text, without special tokens; ``len`` gives lengths in characters.
        seed: another seed draws other prompts.

    Raises:
        ValueError: for an unknown task, a length below `SHORTEST` or one that the keys do not suffice for, or a
            negative `n`.
    """
    if task not in LONG_TASKS:
        raise ValueError(f"unknown task {task!r}; valid tasks: {', '.join(LONG_TASKS)}")
    if length < SHORTEST or n < 0:
        raise ValueError(f"length must be at least {SHORTEST} and n at least 0, got {length} and {n}")
    rng = random.Random(f"long-context/{task}/{length}/{seed}")
    return [LONG_TASKS[task](rng, length, count) for _ in range(n)]


def _question(key: tuple[str, str]) -> str:
    return f" Question: {key[0]} {key[1]}"


def _fitting(pieces: list[str], budget: int, count: Count) -> int:
    """How many of the first pieces fit into a budget of tokens, at least one."""
    for n, piece in enumerate(pieces):
        budget -= count(piece)
        if budget < 0:
            return max(n, 1)
    return len(pieces)
