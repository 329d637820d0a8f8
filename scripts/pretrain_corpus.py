"""Plain-text exercises that give the embedded base model its sub-skills.

Contract: `document(rng, kind)` returns one short document of the given kind; `KINDS` maps the kinds
to their share of the exercise documents. Everything is a statement in plain prose: no instructions,
no "The answer is", nothing in the form that fine-tuning uses, so that the untuned base cannot answer
the bundled tasks and the tuned one has skills to draw on.

Limits: single sums, differences and world facts are told in full, those of test questions included,
as a school book tells them; sets of numbers and pronoun sentences that a task keeps for its test
split are skipped; two-step calculations and lists of words are drawn without looking at the splits.
Calculations stay between 0 and `LARGEST`, listed numbers between 0 and 99.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from moa.tasks.arithmetic import LARGEST
from moa.tasks.core import LETTERS, lettered, split_of
from moa.tasks.names import BOYS, GIRLS, ITEMS, NAMES, PLACES
from moa.tasks.schemas import SCHEMAS
from moa.tasks.world import FACTS, WRONG, Fact, noun, sentence


def _sum(rng: random.Random) -> tuple[int, str, int, int]:
    """`x op y = result` with all numbers from 0 to `LARGEST`."""
    x, y = sorted((rng.randint(0, LARGEST), rng.randint(0, LARGEST)))
    if rng.random() < 0.5:
        return y, "-", x, y - x
    x, y = (y - x, x) if rng.random() < 0.5 else (x, y - x)
    return x, "+", y, x + y


def arithmetic(rng: random.Random) -> str:
    """One calculation, or two in a chain."""
    x, op, y, r = _sum(rng)
    form = rng.randrange(8)
    if form < 4:
        return f"{x} {op} {y} = {r}."
    if form == 4:
        return f"{x} {'plus' if op == '+' else 'minus'} {y} is {r}."
    if form == 5:
        return f"{y} {'more' if op == '+' else 'less'} than {x} is {r}."
    z = rng.randint(0, min(r, 30)) if rng.random() < 0.5 else -rng.randint(0, min(LARGEST - r, 30))
    op2 = "-" if z >= 0 else "+"
    return f"{x} {op} {y} {op2} {abs(z)}: {x} {op} {y} = {r}. {r} {op2} {abs(z)} = {r - z}."


_MORE = (
    "{a} had {x} {i}. {a} got {y} more.",
    "{a} had {x} {i} and {b} had {y} {i}.",
    "There were {x} {i} in a box. {a} put in {y} more.",
    "On Monday {a} bought {x} {i}, and on Friday {y} {i}.",
    "{a} found {x} {i} and then {y} more {i}.",
)
_LESS = (
    "{a} had {x} {i}. {a} gave {y} of them to {b}.",
    "There were {x} {i} in a box. {a} took out {y}.",
    "{a} had {x} {i} and lost {y} of them.",
    "{a} had {x} {i} and {b} only {y} {i}.",
    "{a} had {x} {i}. {b} took {y} away.",
)


def story(rng: random.Random) -> str:
    """A story of one or two calculations, worked out."""
    x, op, y, r = _sum(rng)
    a, b = rng.sample(NAMES, 2)
    i = rng.choice(ITEMS)
    template = rng.choice(_MORE if op == "+" else _LESS)
    text = template.format(a=a, b=b, i=i, x=x, y=y)
    if rng.random() < 0.4:
        if rng.random() < 0.5 and r < LARGEST:
            z = rng.randint(1, min(30, LARGEST - r))
            more = rng.choice(("Then {a} got {z} more.", "{a} bought {z} more.", "And {b} had {z}."))
            work = f"{x} {op} {y} = {r}. {r} + {z} = {r + z}."
            r += z
        else:
            z = rng.randint(0, min(30, r))
            more = rng.choice(("Then {a} lost {z}.", "{a} gave {z} to {b}.", "{b} took {z} away."))
            work = f"{x} {op} {y} = {r}. {r} - {z} = {r - z}."
            r -= z
        text += " " + more.format(a=a, b=b, z=z)
    else:
        work = f"{x} {op} {y} = {r}."
    end = rng.choice(("So there are {r} {i}.", "That makes {r} {i}.", "Now it is {r} {i}.", ""))
    return f"{text} {work} {end.format(r=r, i=i)}".strip()


def compare(rng: random.Random) -> str:
    """Which of some numbers is the largest or smallest, and whose it is."""
    n = rng.choice((2, 3, 3, 4))
    while True:
        numbers = rng.sample(range(100), n)
        if split_of(" ".join(map(str, sorted(numbers)))) == "train":
            break
    most = rng.random() < 0.5
    best = max(numbers) if most else min(numbers)
    if rng.random() < 0.4:
        if n == 2:
            x, y = numbers
            return f"{x} is {'more' if x > y else 'less'} than {y}."
        listed = ", ".join(map(str, numbers))
        return f"The {'largest' if most else 'smallest'} of {listed} is {best}."
    people = rng.sample(NAMES, n)
    i = rng.choice(ITEMS)
    told = ", ".join(f"{p} has {k}" for p, k in zip(people, numbers, strict=True))
    who = people[numbers.index(best)]
    counted = sorted(zip(people, numbers, strict=True), key=lambda pair: -pair[1])
    word = "most" if most else "fewest"
    return rng.choice(
        (
            f"They count {i}. {told}. The {word} is {best}. {who} has the {word} {i}.",
            f"{told}. {who} has the {word}, {best} {i}.",
            f"{told}. {n} people: {', '.join(f'{p} {k}' for p, k in counted)}. {who} has the {word}.",
        )
    )


def sort(rng: random.Random) -> str:
    """A short list of numbers and the same list in order."""
    while True:
        numbers = rng.sample(range(100), rng.choice((2, 3, 4, 4, 5, 5)))
        if split_of(" ".join(map(str, sorted(numbers)))) == "train":
            break
    down = rng.random() < 0.5
    listed = ", ".join(map(str, numbers))
    ordered = ", ".join(map(str, sorted(numbers, reverse=down)))
    order = "largest to smallest" if down else "smallest to largest"
    return rng.choice(
        (
            f"These numbers: {listed}. From {order}: {ordered}.",
            f"{listed} sorted from {order} is {ordered}.",
            f"From {order}, the numbers {listed} are {ordered}.",
        )
    )


_WORDS = sorted({f.subject for f in FACTS} | {*NAMES, *ITEMS, *PLACES})


def copy(rng: random.Random) -> str:
    """A list told again: as it was (mostly, up to three times), backwards, or one of its places."""
    n = rng.randint(2, 8)
    source = rng.randrange(4)
    if source == 0:
        items = [str(k) for k in rng.sample(range(100), n)]
    else:
        items = rng.sample((_WORDS, NAMES, PLACES)[source - 1], n)
    told = ", ".join(items)
    form = rng.randrange(8)
    if form < 5:
        return f"{told}." + f" Again: {told}." * rng.randint(1, 3)
    if form == 5:
        return f"{told}. Backwards: {', '.join(reversed(items))}."
    if form == 6:
        return f"{told}. The first is {items[0]} and the last is {items[-1]}."
    k = rng.randrange(n - 1)
    return f"{told}. After {items[k]} comes {items[k + 1]}."


def lookup(rng: random.Random) -> str:
    """Who is where, and some of it told again in another order."""
    n = rng.randint(2, 5)
    while True:
        people, places = rng.sample(NAMES, n), rng.sample(PLACES, n)
        told = " ".join(f"{p} is in the {q}." for p, q in zip(people, places, strict=True))
        if split_of(told) == "train":
            break
    forms = (
        "So {p} is in the {q}.",
        "Look for {p} in the {q}.",
        "In the {q} is {p}.",
        "The one in the {q} is {p}.",
    )
    pairs = rng.sample(list(zip(people, places, strict=True)), rng.randint(1, n))
    return " ".join([told, *(rng.choice(forms).format(p=p, q=q) for p, q in pairs)])


_AGAIN: dict[str, tuple[str, ...]] = {
    "kind": ("{S} {is_} a kind of {o}", "one {o} is {s}", "of these, {s} is {no}"),
    "capital": ("{o} is the capital of {s}", "in {s}, the capital is {o}"),
    "opposite": ("{s} is the opposite of {o}", "not {s} but {o}"),
    "colour": ("the colour of {s} is {o}", "{o} is the colour of {s}", "{o} like {s}"),
    "material": ("they make {s} of {o}", "{o} is what {s} is made of"),
    "home": ("the home of {s} is {o}", "in {o} lives {s}"),
    "use": ("to {o} you use {s}", "{s} is there to {o}", "with {s} you {o}"),
}


def _tell(fact: Fact, rng: random.Random) -> str:
    """A fact in one of its wordings, the plain one half of the time."""
    if rng.random() < 0.5:
        return fact.say()
    bare = fact.relation in ("capital", "opposite")
    s = fact.subject if bare else noun(fact.subject)
    verb = "are" if fact.subject == "scissors" else "is"
    template = rng.choice(_AGAIN[fact.relation])
    return template.format(s=s, S=s, o=fact.object, no=noun(fact.object), is_=verb)


def facts(rng: random.Random) -> str:
    """World facts, told, confirmed or set right."""
    fact = rng.choice(FACTS)
    form = rng.randrange(10)
    if form < 5:
        return f"{sentence(_tell(fact, rng))}."
    if form == 5:
        return f"It is true that {fact.say()}."
    if form == 6:
        return f"It is false that {fact.say(rng.choice(WRONG[fact]))}. {sentence(fact.say())}."
    if form == 7:
        return f"Some say that {fact.say()}, and that is true."
    if form == 8:
        return f"Some say that {fact.say(rng.choice(WRONG[fact]))}, but that is false: {fact.say()}."
    same = [f.subject for f in FACTS if (f.relation, f.object) == (fact.relation, fact.object)]
    if len(same) < 3:
        return f"{sentence(fact.say())}."
    words = ", ".join(noun(s) for s in rng.sample(same, 3))
    return f"{sentence(words)}: {_shared(fact)}."


def _shared(fact: Fact) -> str:
    """What several subjects have in common."""
    match fact.relation:
        case "kind":
            return f"each is {noun(fact.object)}"
        case "colour":
            return f"each is {fact.object}"
        case "material":
            return f"each is made of {fact.object}"
        case "home":
            return f"each lives in {fact.object}"
        case _:
            return f"you use each to {fact.object}"


def letters(rng: random.Random) -> str:
    """Lettered options and which letter is which: of words, of results, of facts."""
    n = rng.choice((3, 4, 4, 4))
    form = rng.randrange(6)
    if form < 2:
        options = rng.sample(_WORDS, n)
        pairs = rng.sample(list(zip(LETTERS, options, strict=False)), rng.randint(1, n))
        form = rng.choice(("{x} is {y}.", "{y} is {x}."))
        return " ".join([f"{lettered(options)}.", *(form.format(x=x, y=y) for x, y in pairs)])
    if form < 4:
        x, op, y, r = _sum(rng)
        others = [k for k in {r + d for d in (-20, -10, -2, -1, 1, 2, 10, 20)} if 0 <= k <= LARGEST + 20]
        numbers = [r, *rng.sample(sorted(others), n - 1)]
        rng.shuffle(numbers)
        letter = LETTERS[numbers.index(r)]
        listed = lettered([str(k) for k in numbers])
        return f"{listed}. {x} {op} {y} = {r}. {rng.choice((f'{r} is {letter}.', f'It is {letter}.'))}"
    fact = rng.choice(FACTS)
    peers = [f for f in FACTS if f.relation == fact.relation and f.object != fact.object]
    right = fact.object if fact.relation in ("capital", "opposite") else fact.subject
    words = {f.object if right == fact.object else f.subject for f in peers} - {right}
    options = [right, *rng.sample(sorted(words), n - 1)]
    rng.shuffle(options)
    letter = LETTERS[options.index(right)]
    return f"{lettered(options)}. {sentence(fact.say())}. It is {letter}."


def pronouns(rng: random.Random) -> str:
    """A sentence with a pronoun, and whom it means."""
    while True:
        people, pronoun = (GIRLS, "she") if rng.random() < 0.5 else (BOYS, "he")
        first, second = rng.sample(people, 2)
        told, state, refers_to_first = rng.choice(SCHEMAS)
        if split_of(f"{first} {second} {told} {state}") == "train":
            break
    text = f"{told.format(a=first, b=second)} because {pronoun} {state}."
    who = first if refers_to_first else second
    return rng.choice((f"{text} {who} {state}.", f"{text} It was {who} who {state}."))


_MAKERS: dict[str, tuple[float, Callable[[random.Random], str]]] = {
    "arithmetic": (0.12, arithmetic),
    "story": (0.12, story),
    "compare": (0.08, compare),
    "sort": (0.09, sort),
    "copy": (0.07, copy),
    "lookup": (0.13, lookup),
    "facts": (0.17, facts),
    "letters": (0.16, letters),
    "pronouns": (0.06, pronouns),
}
KINDS: dict[str, float] = {kind: share for kind, (share, _) in _MAKERS.items()}


def document(rng: random.Random, kind: str) -> str:
    """One to four exercises of a kind as one document, about 150 characters of it."""
    maker = _MAKERS[kind][1]
    parts: list[str] = []
    target = rng.randint(20, 220)
    while sum(map(len, parts)) < target:
        parts.append(maker(rng))
    return rng.choice((" ", "\n")).join(parts)


def wording(rng: random.Random) -> str:
    """Prompt wording without answers, for the tokenizer's training text only."""
    frames = (
        "### Instruction:\n{q}\n\n### Response: The answer is",
        "### Instruction:\n{q} Sort these numbers from largest to smallest:\n\n### Response:",
        "### Instruction:\nTrue or false: {q} Is this true or false? Is it true that\n\n### Response:",
        "### Instruction:\n{q} How many {i} does {a} have now? How many are left?\n\n### Response:",
        "### Instruction:\nWhich of these is a {i}? What is the {q}? Who is? Where is {a}?\n\n###",
        "### Instruction:\nSome children count their {i}. Who has the fewest {i}?\n\n### Response:",
        "### Input:\n### Output: {q} Options: Choose the correct answer. How many in all? more {i}",
    )
    kind = rng.choice(sorted(KINDS))
    return rng.choice(frames).format(q=_MAKERS[kind][1](rng), i=rng.choice(ITEMS), a=rng.choice(NAMES))
