"""One row per way in which models write an answer."""

from __future__ import annotations

import pytest

from moa.evaluation.answers import extract, fields_right, is_correct, kind_of

NUMBERS = [
    ("The answer is 12", "12"),
    ("The answer is 12.", "12"),
    ("12 + 30 = 42. The answer is 42", "42"),
    ("-3", "-3"),
    ("It is −3.5 degrees.", "-3.5"),
    ("That costs $1,200.", "1200"),
    ("1,200,300.25", "1200300.25"),
    ("He lost -$5.", "-5"),
    ("5 - 3", "3"),
    ("12-5", "5"),
    ("x=-4", "-4"),
    ("They are 3, 4", "4"),
    ("1,2,3", "3"),
    ("about .5", ".5"),
    ("10.0.", "10.0"),
    ("20 %", "20"),
    ("7 apples", "7"),
    ("none at all", None),
    ("", None),
]
CHOICES = [
    ("The answer is (D).", "D"),
    ("A thing about Bs. The answer is C", "C"),
    ("Answer: B", "B"),  # the published rule reads A
    ("The correct answer is: **E**", "E"),
    ("The answer is option A because C is too large", "A"),
    ("the answer is b", "B"),
    ("the answer is a rectangle (C)", "C"),
    ("The answer is (A). No: the answer is (B).", "B"),
    (r"The answer is \boxed{C}.", "C"),
    ("Adam gave Eve 3, so (C)", "C"),
    ("Clearly D)", "D"),
    ("B", "B"),
    (" B.", "B"),
    ("A) 3 B) 4, hence choice B is right here", "B"),
    ("So it must be D", "D"),
    ("B: 96 is right", "B"),
    ("A train leaves", None),
    ("nothing", None),
    ("Every Dog", None),
]
BOOLS = [
    ("the correct answer is true", "true"),
    ("False.", "false"),
    ("It is true that it seems so, but the answer is false", "false"),
    ("The answer is true. Not false.", "true"),
    ("true or false? false", "false"),
    ("untrue", None),
    ("yes", None),
]
LABELS = [
    ("the correct answer is ending4", "ending4"),
    ("Solution1", "solution1"),
    ("option 2 is wrong; the answer is Option 1", "option1"),
    ("answer3 and then answer2", "answer2"),
    ("the correct answer is answer12.", "answer12"),
    ("the answer is 3", None),
]
TEXTS = [
    ("The fewest is 24. The answer is Susan", "susan"),
    ("the answer is  In The Field.\nNext question", "in the field"),
    ("Susan", "susan"),
    ("The answer is 74, 66, 22", "74, 66, 22"),
    ("", None),
]
OBJECTS = [
    ('{"b": 1, "a": "x"}', '{"a": "x", "b": 1}'),
    ('Sure: {"a":1} and {"a":2}', '{"a": 1}'),
    ('```json\n{"a": {"b": [1, 2]}}\n```', '{"a": {"b": [1, 2]}}'),
    ('{not one} {"a": "é"}', '{"a": "é"}'),
    ('{"a": 1', None),
    ("[1, 2]", None),
    ("", None),
]
TABLE = [
    (kind, text, answer)
    for kind, rows in {
        "number": NUMBERS,
        "choice": CHOICES,
        "bool": BOOLS,
        "label": LABELS,
        "text": TEXTS,
        "json": OBJECTS,
    }.items()
    for text, answer in rows
]


@pytest.mark.parametrize(("kind", "text", "answer"), TABLE)
def test_extract(kind: str, text: str, answer: str | None):
    assert extract(kind, text) == answer


@pytest.mark.parametrize(
    ("kind", "text", "gold", "correct"),
    [
        ("number", "The answer is 18.", "18.0", True),
        ("number", "1.8333", "1.8333333333333335", True),
        ("number", "1.83", "1.8333333333333335", False),
        ("number", "$1,200", "1200", True),
        ("number", "nothing", "3", False),
        ("choice", "The answer is (C)", "C", True),
        ("bool", "TRUE", "true", True),
        ("bool", "true", "false", False),
        ("label", "the correct answer is Answer 2", "answer2", True),
        ("text", "The answer is paris.", "Paris", True),
        ("text", "The answer is in Paris", "Paris", False),
        ("text", "The answer is 74, 66", "66, 74", False),
    ],
)
def test_is_correct(kind: str, text: str, gold: str, correct: bool):
    assert is_correct(kind, text, gold) is correct


@pytest.mark.parametrize(
    ("golds", "kind"),
    [
        (["4", "-15.0", "1,200", ".5"], "number"),
        (["A", "E"], "choice"),
        (["true", "false"], "bool"),
        (["solution1", "solution2"], "label"),
        (["option1"], "label"),
        (["Susan", "in the field"], "text"),
        (["A", "Susan"], "text"),
        (["74, 66, 22"], "text"),
        (["3,5", "4,5"], "text"),
        (["12,34"], "text"),
        (["1,2000"], "text"),
        (["-$1,234.50", "$.5"], "number"),
        ([], "text"),
    ],
)
def test_kind_of(golds: list[str], kind: str):
    assert kind_of(golds) == kind


def test_unknown_kind_and_impossible_gold_are_errors():
    with pytest.raises(ValueError, match=r"'letter'.*choice"):
        extract("letter", "A")
    with pytest.raises(ValueError, match="'many' is not a number"):
        is_correct("number", "3", "many")


def test_objects_are_equal_up_to_spacing_and_order_and_nothing_else():
    gold = '{"a": 1, "b": true}'
    assert is_correct("json", '{"b":true,"a":1}', gold)
    for other in ('{"a": 1}', '{"a": 1, "b": 1}', '{"a": "1", "b": true}', '{"a": 1, "b": true, "c": 0}', "none"):
        assert not is_correct("json", other, gold)


def test_objects_are_compared_field_by_field():
    gold = '{"a": 1, "b": true, "c": null}'
    assert fields_right('{"c": null, "b": 1, "a": 1}', gold) == {"a": True, "b": False, "c": True}
    assert fields_right("nothing", gold) == {"a": False, "b": False, "c": False}
    with pytest.raises(ValueError, match="'no object' is not a json"):
        fields_right("{}", "no object")


@pytest.mark.parametrize(("golds", "kind"), [(['{"a": 1}', '{"b": 2}'], "json"), (['{"a": 1}', "x"], "text")])
def test_sets_of_objects_are_recognised(golds: list[str], kind: str):
    assert kind_of(golds) == kind


@pytest.mark.parametrize(
    ("text", "right"),
    [(" 4716. And more", True), ("4716", True), ("47165", False), ("It is 4716", False), ("  ", False)],
)
def test_an_answer_that_begins_a_text_does_not_run_on(text: str, right: bool):
    assert is_correct("begins", text, "4716") is right
