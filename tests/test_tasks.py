"""The bundled task suite: determinism, disjoint splits, right gold answers, honest chance values."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from datetime import date, datetime

import pytest

from moa.tasks import SUITE, TASKS, Task, bookings, generate
from moa.tasks.core import LETTERS, SPLITS, split_of
from moa.tasks.schemas import SCHEMAS
from moa.tasks.world import FACTS

N = {"train": 800, "test": 200}
FIELDS = ["instruction", "input", "output", "answer"]
PROPERTIES = {  # question -> kinds of things of which the answer is yes
    "Are both alive": {"animal", "bird", "fish", "insect", "flower", "tree"},
    "Can you eat or drink both": {"fruit", "vegetable", "drink"},
    "Do people make both": {
        "tool", "garment", "vehicle", "piece of furniture", "musical instrument", "building",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], list[dict[str, str]]]:
    """Rows of every task and split."""
    return {(name, s): generate(name, s, N[s]) for name in TASKS for s in SPLITS}


def all_rows(rows, name):
    return rows[name, "train"] + rows[name, "test"]


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


@pytest.mark.parametrize("name", SUITE)
def test_rows_have_the_declared_form(rows, name):
    for row in all_rows(rows, name):
        assert list(row) == FIELDS
        assert all(isinstance(value, str) for value in row.values())
        assert row["input"] == ""
        assert row["instruction"]
        assert row["output"].endswith(f"The answer is {row['answer']}")


@pytest.mark.parametrize("name", SUITE)
def test_answer_is_of_the_declared_kind(rows, name):
    form = {"number": r"\d{1,2}", "choice": "[A-D]", "bool": "true|false", "text": r"\S.*"}
    for row in all_rows(rows, name):
        assert re.fullmatch(form[TASKS[name].kind], row["answer"])


def test_the_suite_has_two_families_and_long_answers(rows):
    assert Counter(task.family for task in SUITE.values()).keys() == {"math", "commonsense"}
    assert all(isinstance(task, Task) and task.name == name for name, task in TASKS.items())
    assert sum(any(" " in r["answer"] for r in rows[name, "test"]) for name in SUITE) >= 2


@pytest.mark.parametrize("name", TASKS)
def test_same_arguments_give_the_same_rows(rows, name):
    assert generate(name, "test", N["test"]) == rows[name, "test"]
    assert generate(name, "test", 20) == rows[name, "test"][:20]
    assert generate(name, "test", 20, seed=1) != rows[name, "test"][:20]


def test_rows_do_not_depend_on_the_process_or_its_hash_seed():
    here = [generate(name, "train", 5, 3) for name in TASKS]
    code = "from moa.tasks import *; print([generate(n, 'train', 5, 3) for n in TASKS])"
    path = os.pathsep.join(p for p in sys.path if p)
    elsewhere = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert elsewhere.strip() == str(here)


@pytest.mark.parametrize("name", TASKS)
def test_no_question_is_in_both_splits(rows, name):
    train = {r["instruction"] for seed in (0, 7) for r in generate(name, "train", 800, seed)}
    assert len({r["instruction"] for r in rows[name, "train"]}) == N["train"]
    assert not train & {r["instruction"] for r in rows[name, "test"]}


@pytest.mark.parametrize("name", ["add_sub", "choice_arithmetic", "two_step"])
def test_no_calculation_is_in_both_splits(rows, name):
    def worked(split):
        return {r["output"].split(". The answer")[0] for r in rows[name, split]}

    assert not worked("train") & worked("test")


@pytest.mark.parametrize("name", ["sorting", "compare"])
def test_no_set_of_numbers_is_in_both_splits(rows, name):
    train, test = ({frozenset(numbers(r["instruction"])) for r in rows[name, split]} for split in SPLITS)
    assert not train & test


def told(output: str) -> list[str]:
    """The facts that an output tells, in lower case."""
    return output.lower().split(". the answer")[0].split(". ")


def test_test_facts_are_told_in_no_training_row(rows):
    facts = {
        split: {
            fact for name in ("yes_no", "fact_choice", "facts") for r in rows[name, split] for fact in told(r["output"])
        }
        for split in SPLITS
    }
    assert not facts["train"] & facts["test"]
    assert len(facts["test"]) > 50


def test_every_fact_has_one_object():
    keys = [(f.relation, f.subject) for f in FACTS]
    assert len(keys) == len(set(keys))


def test_add_sub_answers(rows):
    less = ("left", "now", "more")
    for row in all_rows(rows, "add_sub"):
        x, y = numbers(row["instruction"])
        text = row["instruction"]
        taken = re.search(r"gives|takes out|lost|How many more", text)
        assert row["answer"] == str(x - y if taken else x + y)
        assert taken or "all" in text or any(word in text for word in (*less, "buy"))


def test_two_step_answers(rows):
    for row in all_rows(rows, "two_step"):
        x, y, z = numbers(row["instruction"])
        if "in all" in row["instruction"]:
            expected = x + y + z
        else:
            signs = [
                1 if verb in ("gets", "buys") else -1
                for verb in re.findall(r"gets|buys|gives|loses", row["instruction"])
            ]
            expected = x + signs[0] * y + signs[1] * z
        assert row["answer"] == str(expected)


def test_choice_arithmetic_answers(rows):
    for row in all_rows(rows, "choice_arithmetic"):
        x, op, y = re.search(r"(\d+) ([+-]) (\d+)\?", row["instruction"]).groups()
        result = int(x) + int(y) if op == "+" else int(x) - int(y)
        assert row["instruction"].endswith("A) below 10 B) 10 to 19 C) 20 to 29 D) 30 or more")
        assert row["answer"] == LETTERS[min(result // 10, 3)]


def test_sorting_answers(rows):
    for row in all_rows(rows, "sorting"):
        down = "from largest" in row["instruction"]
        expected = sorted(numbers(row["instruction"]), reverse=down)
        assert numbers(row["answer"]) == expected
        assert len(set(expected)) == len(expected)


def test_compare_answers(rows):
    for row in all_rows(rows, "compare"):
        amounts = [int(n) for n in re.findall(r"has (\d+)", row["instruction"])]
        best = max(amounts) if "the most" in row["instruction"] else min(amounts)
        assert row["answer"] == str(best)
        assert len(set(amounts)) == 4


KIND = {f.say().lower(): f.object for f in FACTS if f.relation == "kind"}


def test_yes_no_answers_follow_from_the_kinds(rows):
    for row in all_rows(rows, "yes_no"):
        question = row["instruction"].removeprefix("True or false? ").split(",")[0]
        kinds = [KIND[fact] for fact in told(row["output"])]
        both = all(kind in PROPERTIES[question] for kind in kinds)
        assert len(kinds) == 2
        assert row["answer"] == ("true" if both else "false")


def test_fact_choice_answers_follow_from_the_kinds(rows):
    classes = (
        {"animal", "bird", "fish", "insect"},
        {"fruit", "vegetable", "drink"},
        {"tool", "garment", "musical instrument"},
        {"vehicle", "piece of furniture", "building"},
    )
    for row in all_rows(rows, "fact_choice"):
        facts = told(row["output"])
        assert len(set(facts)) == 2
        assert all(KIND[fact] in classes[LETTERS.index(row["answer"])] for fact in facts)


def test_facts_offers_one_right_answer(rows):
    for row in all_rows(rows, "facts"):
        options = re.search(r"Choose: (.+)\.$", row["instruction"]).group(1).split(", ")
        (fact,) = [f for f in FACTS if [f.say().lower()] == told(row["output"])]
        true = {f.object for f in FACTS if f.subject == fact.subject}
        assert fact.object == row["answer"]
        assert len(set(options)) == 4
        assert true & set(options) == {row["answer"]}


def test_word_list_answers(rows):
    order = ("first", "second", "third", "fourth", "fifth")
    for row in all_rows(rows, "lookup"):
        words = re.search(r"list: (.+?)\. ", row["instruction"]).group(1).split(", ")
        asked = re.findall(rf"the ({'|'.join(order)})", row["instruction"])
        assert row["answer"] == ", ".join(words[order.index(place)] for place in asked)
        assert len(asked) == 2
    for row in all_rows(rows, "reverse"):
        words = re.search(r": (.+)\.$", row["instruction"]).group(1).split(", ")
        assert row["answer"] == ", ".join(words[::-1])


def test_coreference_answers_follow_the_schemas(rows):
    first_is_meant = {(story, state): first for story, state, first in SCHEMAS}
    for row in all_rows(rows, "coreference"):
        text, state = re.match(r"(.+) because s?he (.+)\. Who", row["instruction"]).groups()
        first, second = re.findall(r"\b[A-Z]\w+", text)
        story = text.replace(first, "{a}").replace(second, "{b}")
        assert row["answer"] == (first if first_is_meant[story, state] else second)


@pytest.mark.parametrize("name", [n for n, t in TASKS.items() if t.kind in ("choice", "bool")])
def test_closed_answers_are_balanced(rows, name):
    counts = Counter(r["answer"] for r in rows[name, "train"])
    assert len(counts) == round(1 / TASKS[name].chance)
    assert all(abs(c / N["train"] - TASKS[name].chance) < 0.06 for c in counts.values())


@pytest.mark.parametrize("name", ["add_sub", "two_step", "sorting"])
def test_no_constant_answer_beats_open_chance(rows, name):
    most = Counter(r["answer"] for r in rows[name, "train"]).most_common(1)[0][1]
    assert most / N["train"] < 0.04
    assert 0 < TASKS[name].chance < 0.11


def test_position_of_the_right_person_is_balanced(rows):
    first = sum(re.search(r"\b[A-Z]\w+", r["instruction"]).group() == r["answer"] for r in rows["coreference", "train"])
    assert abs(first / N["train"] - TASKS["coreference"].chance) < 0.06


@pytest.mark.parametrize(("name", "options"), [("compare", 4), ("facts", 4)])
def test_position_of_the_right_option_is_balanced(rows, name, options):
    places = Counter()
    for row in rows[name, "train"]:
        offered = re.search(r"(?:Choose: |\. )(.+?)[.?]", row["instruction"]).group(1).split(", ")
        (place,) = [i for i, o in enumerate(offered) if o.split(" has ")[-1] == row["answer"]]
        places[place] += 1
    assert TASKS[name].chance == 1 / options
    assert all(abs(c / N["train"] - 1 / options) < 0.06 for c in places.values())


def test_bookings_say_what_their_json_says(rows):
    for row in all_rows(rows, "bookings"):
        message, gold = row["instruction"], json.loads(row["answer"])
        assert row["output"] == row["answer"]
        assert tuple(gold) == bookings.FIELDS
        assert message.startswith(bookings.INSTRUCTION)
        assert gold["name"] in message
        assert gold["service"] in message
        day = date.fromisoformat(gold["date"])
        assert str(day.year) in message
        assert day.strftime("%b") in message or day.strftime("%d.%m.%Y") in message
        assert datetime.strptime(gold["time"], "%H:%M").minute % 5 == 0
        amount, currency = gold["price"].split()
        assert f"{float(amount):.2f}" == amount
        assert re.search({"EUR": "euros|€", "USD": r"dollars|\$", "GBP": "pounds|£"}[currency], message)


def test_words_of_bookings_mean_their_values(rows):
    known = {
        "quarter to twelve in the morning": "11:45", "half past twelve in the afternoon": "12:30",
        "half past seven in the evening": "19:30", "quarter past one in the afternoon": "13:15",
        "twelve o'clock in the afternoon": "12:00", "12:15 pm": "12:15", "8 am": "08:00",
    }  # fmt: skip
    said = {phrase: set() for phrase in known}
    for row in all_rows(rows, "bookings") + generate("bookings", "train", 4000, 1):
        for phrase in known:
            if f" {phrase}" in row["instruction"]:
                said[phrase].add(json.loads(row["answer"])["time"])
    assert said == {phrase: {time} for phrase, time in known.items()}
    assert [bookings.spelt(number) for number in (0, 12, 20, 69)] == ["zero", "twelve", "twenty", "sixty-nine"]


def test_test_bookings_have_names_days_and_amounts_of_their_own(rows):
    def parts(split):
        for row in rows["bookings", split]:
            gold = json.loads(row["answer"])
            yield from (gold["name"].split()[1], gold["date"], gold["price"].partition(".")[0])

    assert not set(parts("train")) & set(parts("test"))


def test_the_explanation_names_every_field():
    assert re.findall(r'^"(\w+)":', bookings.EXPLANATION, re.MULTILINE) == list(bookings.FIELDS)


def test_unknown_task_names_the_valid_ones():
    with pytest.raises(ValueError, match=r"unknown task 'addsub'.*add_sub.*reverse"):
        generate("addsub", "train", 1)


def test_unknown_split_names_the_valid_ones():
    with pytest.raises(ValueError, match=r"unknown split 'dev'.*train, test"):
        generate("add_sub", "dev", 1)


def test_too_many_rows_is_an_error_not_a_repetition():
    with pytest.raises(ValueError, match=r"only about \d+ distinct test rows; 100000 asked"):
        generate("fact_choice", "test", 100_000)
    with pytest.raises(ValueError, match="at least 0"):
        generate("yes_no", "test", -1)


def test_split_is_a_stable_hash():
    assert [split_of(key) for key in ("12+5", "12+6", "12+7", "3+9")].count("train") >= 2
    share = sum(split_of(str(i)) == "test" for i in range(5000)) / 5000
    assert 0.18 < share < 0.22
