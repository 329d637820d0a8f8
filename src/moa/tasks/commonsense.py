"""The commonsense family: facts, properties that follow from them, coreference, lists of words.

Contract: `yes_no`, `fact_choice` and `facts` split by fact (relation and subject), so a test
question needs a fact that no training row of the three tells; `coreference` splits by the people and
their story, `lookup` and `reverse` by the set of words.
"""

from __future__ import annotations

import random

from moa.tasks.core import LETTERS, Draw, Task, lettered, members
from moa.tasks.names import BOYS, GIRLS
from moa.tasks.schemas import SCHEMAS
from moa.tasks.world import CATEGORIES, FACTS, WRONG, Fact, noun, sentence

_QUESTIONS = {
    "capital": "What is the capital of {s}?",
    "opposite": "What is the opposite of {s}?",
    "use": "What do you use {s} for?",
    "kind": "What is {s}?",
    "colour": "What colour is {s}?",
    "material": "What is {s} made of?",
    "home": "Where does {s} live?",
}
_WORDS = sorted({f.subject for f in FACTS})
_LIVING = ("animal", "bird", "fish", "insect", "flower", "tree")
_FOOD = ("fruit", "vegetable", "drink")
_MADE = ("tool", "garment", "vehicle", "piece of furniture", "musical instrument", "building")
# Property asked for -> kinds of things that have it, kinds that have not; doubtful ones are in neither.
_PROPERTIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Are both alive, {s} and {t}?": (_LIVING, (*_MADE, "metal", "drink")),
    "Can you eat or drink both, {s} and {t}?": (_FOOD, (*_MADE, "metal")),
    "Do people make both, {s} and {t}?": (_MADE, (*_LIVING, "vegetable")),
}
_CLASSES = (
    "animals",
    "food or drink",
    "tools, clothes or instruments",
    "vehicles, furniture or buildings",
)
_MEMBERS = (
    ("animal", "bird", "fish", "insect"),
    _FOOD,
    ("tool", "garment", "musical instrument"),
    ("vehicle", "piece of furniture", "building"),
)
_CLASS_QUESTIONS = ("What are {s} and {t}?", "Where do {s} and {t} belong?", "Sort {s} and {t}.")


def _fact_key(fact: Fact) -> str:
    return f"{fact.relation} {fact.subject}"


_BY_SPLIT = {split: members(FACTS, split, _fact_key) for split in ("train", "test")}
_BY_KIND = {
    (split, kind): [f for f in facts if (f.relation, f.object) == ("kind", kind)]
    for split, facts in _BY_SPLIT.items()
    for kind in CATEGORIES
}


def _two_things(rng: random.Random, split: str, first: tuple[str, ...], second: tuple[str, ...]) -> tuple[Fact, Fact]:
    """Two different things, one of the first kinds and one of the second, from the split's facts."""
    one = rng.choice([f for kind in first for f in _BY_KIND[split, kind]])
    pool = [f for kind in second for f in _BY_KIND[split, kind] if f.subject != one.subject]
    return one, rng.choice(pool)


def yes_no(rng: random.Random, split: str) -> Draw:
    """Whether two things both have a property that follows from their kinds; equal odds."""
    question = rng.choice(list(_PROPERTIES))
    truth = rng.random() < 0.5
    has, lacks = _PROPERTIES[question]
    first, second = _two_things(rng, split, has, has if truth else lacks)
    pair = [first, second] if rng.random() < 0.5 else [second, first]
    verdict = "true" if truth else "false"
    s, t = (noun(fact.subject) for fact in pair)
    told = ". ".join(sentence(fact.say()) for fact in pair)
    return Draw(
        key=_fact_key(first),
        instruction=f"True or false? {question.format(s=s, t=t)}",
        output=f"{told}. The answer is {verdict}",
        answer=verdict,
    )


def fact_choice(rng: random.Random, split: str) -> Draw:
    """To which of four classes two things belong; the classes keep their letters."""
    wanted = rng.randrange(4)
    pair = _two_things(rng, split, _MEMBERS[wanted], _MEMBERS[wanted])
    s, t = (noun(fact.subject) for fact in pair)
    told = ". ".join(sentence(fact.say()) for fact in pair)
    question = rng.choice(_CLASS_QUESTIONS).format(s=s, t=t)
    return Draw(
        key=_fact_key(pair[0]),
        instruction=f"{question} {lettered(_CLASSES)}",
        output=f"{told}. The answer is {LETTERS[wanted]}",
        answer=LETTERS[wanted],
    )


def facts(rng: random.Random, split: str) -> Draw:
    """A question about one fact with four possible answers, one of them right."""
    fact = rng.choice(_BY_SPLIT[split])
    options = [fact.object, *rng.sample(WRONG[fact], 3)]
    rng.shuffle(options)
    bare = fact.relation in ("capital", "opposite")
    subject = fact.subject if bare else noun(fact.subject)
    return Draw(
        key=_fact_key(fact),
        instruction=f"{_QUESTIONS[fact.relation].format(s=subject)} Choose: {', '.join(options)}.",
        output=f"{sentence(fact.say())}. The answer is {fact.object}",
        answer=fact.object,
    )


def coreference(rng: random.Random, split: str) -> Draw:
    """Two people, one pronoun: whom does it mean?"""
    people, pronoun = (GIRLS, "she") if rng.random() < 0.5 else (BOYS, "he")
    first, second = rng.sample(people, 2)
    schema = rng.choice(SCHEMAS)
    story, state, refers_to_first = schema
    answer = first if refers_to_first else second
    text = story.format(a=first, b=second)
    return Draw(
        key=f"{first} {second} {story} {state}",
        instruction=f"{text} because {pronoun} {state}. Who {state}?",
        output=f"{answer} {state}. The answer is {answer}",
        answer=answer,
    )


_ORDINALS = ("first", "second", "third", "fourth", "fifth")


def lookup(rng: random.Random, split: str) -> Draw:
    """Two places of a list of four or five words, in the list's order."""
    words = rng.sample(_WORDS, rng.randint(4, 5))
    i, j = sorted(rng.sample(range(len(words)), 2))
    return Draw(
        key=" ".join(sorted(words)),
        instruction=f"Here is a list: {', '.join(words)}. Which are the {_ORDINALS[i]} and the {_ORDINALS[j]} word?",
        output=f"The answer is {words[i]}, {words[j]}",
        answer=f"{words[i]}, {words[j]}",
    )


def reverse(rng: random.Random, split: str) -> Draw:
    """Four to six words to say backwards."""
    words = rng.sample(_WORDS, rng.randint(4, 6))
    answer = ", ".join(reversed(words))
    return Draw(
        key=" ".join(sorted(words)),
        instruction=f"Say these words backwards: {', '.join(words)}.",
        output=f"The answer is {answer}",
        answer=answer,
    )


COMMONSENSE_TASKS = (
    Task("yes_no", "commonsense", "bool", 0.5, yes_no),
    Task("fact_choice", "commonsense", "choice", 0.25, fact_choice),
    Task("facts", "commonsense", "text", 0.25, facts),
    Task("coreference", "commonsense", "text", 0.5, coreference),
    Task("lookup", "commonsense", "text", (1 / 6 + 1 / 10) / 2, lookup),
    Task("reverse", "commonsense", "text", (1 / 24 + 1 / 120 + 1 / 720) / 3, reverse),
)
