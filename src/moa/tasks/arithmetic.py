"""The math family: word problems with one and two steps, multiple choice, sorting, comparison.

Contract: operands and results are integers from 1 to `LARGEST`, listed numbers from 1 to 99. A row's key is the numbers
and what is done with them, so a test question's calculation never occurs in a training row.
"""

from __future__ import annotations

import random

from moa.tasks.core import LETTERS, Draw, Task, lettered
from moa.tasks.names import ITEMS, NAMES

LARGEST = 50  # of all operands and results

_ADD = (
    "{a} has {x} {item}. {a} gets {y} more. How many {item} does {a} have now?",
    "{a} has {x} {item} and {b} has {y} {item}. How many {item} do they have in all?",
    "There are {x} {item} in a box. {a} puts in {y} more. How many {item} are in the box now?",
    "{a} bought {x} {item} on Monday and {y} {item} on Friday. How many {item} did {a} buy?",
)
_SUB = (
    "{a} has {x} {item}. {a} gives {y} of them to {b}. How many {item} does {a} have left?",
    "There are {x} {item} in a box. {a} takes out {y}. How many {item} are left in the box?",
    "{a} had {x} {item} and lost {y} of them. How many {item} does {a} have now?",
    "{a} has {x} {item} and {b} has {y} {item}. How many more {item} does {a} have than {b}?",
)
_TWO_STEP = (
    ("+-", "{a} has {x} {item}. {a} gets {y} more and gives {z} to {b}. How many {item} are left?"),
    (
        "-+",
        "{a} has {x} {item}. {a} gives {y} to {b} and buys {z} more. How many {item} are there?",
    ),
    ("++", "{a} has {x} {item}, {b} has {y} and {c} has {z}. How many {item} do they have in all?"),
    ("--", "{a} has {x} {item}. {a} loses {y} and gives {z} to {b}. How many {item} are left?"),
)


def calculate(x: int, op: str, y: int) -> int:
    """`x + y` or `x - y`."""
    return x + y if op == "+" else x - y


def _people(rng: random.Random) -> dict[str, str]:
    a, b, c = rng.sample(NAMES, 3)
    return {"a": a, "b": b, "c": c, "item": rng.choice(ITEMS)}


def _operands(rng: random.Random, op: str) -> tuple[int, int]:
    """Two numbers of at least 1 whose sum or difference lies between 1 and `LARGEST`."""
    small, large = sorted(rng.sample(range(2, LARGEST + 1), 2))
    if op == "-":
        return large, small
    return (small, large - small) if large - small > 1 else (large - 2, 2)


def add_sub(rng: random.Random, split: str) -> Draw:
    """A story with one addition or subtraction."""
    op = rng.choice("+-")
    x, y = _operands(rng, op)
    template = rng.choice(_ADD if op == "+" else _SUB)
    result = calculate(x, op, y)
    return Draw(
        key=f"{x}{op}{y}",
        instruction=template.format(x=x, y=y, **_people(rng)),
        output=f"{x} {op} {y} = {result}. The answer is {result}",
        answer=str(result),
    )


def two_step(rng: random.Random, split: str) -> Draw:
    """A story with two additions or subtractions; the first result feeds the second."""
    ops, template = rng.choice(_TWO_STEP)
    while True:
        x, y, z = rng.randint(5, LARGEST), rng.randint(2, 25), rng.randint(2, 15)
        middle = calculate(x, ops[0], y)
        result = calculate(middle, ops[1], z)
        if 1 <= middle <= LARGEST and 1 <= result <= LARGEST:
            break
    return Draw(
        key=f"{x}{ops[0]}{y}{ops[1]}{z}",
        instruction=template.format(x=x, y=y, z=z, **_people(rng)),
        output=f"{x} {ops[0]} {y} = {middle}. {middle} {ops[1]} {z} = {result}. The answer is {result}",
        answer=str(result),
    )


_ASKED = ("How much is", "What is", "Where does this lie:", "Which is right for")
_RANGES = ("below 10", "10 to 19", "20 to 29", "30 or more")


def choice_arithmetic(rng: random.Random, split: str) -> Draw:
    """A bare sum or difference; in which of four ranges is it? The ranges keep their letters."""
    wanted = rng.randrange(4)
    while True:
        op = rng.choice("+-")
        x, y = _operands(rng, op)
        result = calculate(x, op, y)
        if min(result // 10, 3) == wanted:
            break
    letter = LETTERS[wanted]
    return Draw(
        key=f"{x}{op}{y}",
        instruction=f"{rng.choice(_ASKED)} {x} {op} {y}? {lettered(_RANGES)}",
        output=f"{x} {op} {y} = {result}. The answer is {letter}",
        answer=letter,
    )


def sorting(rng: random.Random, split: str) -> Draw:
    """Four or five different numbers to put in order, up or down."""
    numbers = rng.sample(range(1, 100), rng.choice((4, 5)))
    down = rng.random() < 0.5
    order = "largest to smallest" if down else "smallest to largest"
    answer = ", ".join(map(str, sorted(numbers, reverse=down)))
    return Draw(
        key=" ".join(map(str, sorted(numbers))),
        instruction=f"Sort these numbers from {order}: {', '.join(map(str, numbers))}.",
        output=f"The answer is {answer}",
        answer=answer,
    )


def compare(rng: random.Random, split: str) -> Draw:
    """Four people with different amounts; how much is the most or the fewest?"""
    people = rng.sample(NAMES, 4)
    amounts = rng.sample(range(2, 100), 4)
    item = rng.choice(ITEMS)
    word, best = ("most", max(amounts)) if rng.random() < 0.5 else ("fewest", min(amounts))
    story = ", ".join(f"{p} has {n}" for p, n in zip(people, amounts, strict=True))
    return Draw(
        key=" ".join(map(str, sorted(amounts))),
        instruction=f"Some children count their {item}. {story}. How many {item} does the child with the {word} have?",
        output=f"The {word} is {best}. The answer is {best}",
        answer=str(best),
    )


MATH_TASKS = (
    Task("add_sub", "math", "number", 0.01, add_sub),
    Task("two_step", "math", "number", 0.01, two_step),
    Task("choice_arithmetic", "math", "choice", 0.25, choice_arithmetic),
    Task("sorting", "math", "text", (1 / 24 + 1 / 120) / 2, sorting),
    Task("compare", "math", "number", 1 / 4, compare),
)
