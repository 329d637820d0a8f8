"""Rows in every dialect, from every place, and the prompts made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moa.data import TEMPLATES, completion_of, example_of, load_rows, prompt_of


def write(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_alpaca_prompt_is_the_papers():
    row = {"instruction": "Add 1 and 2.", "input": "", "output": "\nA: 3", "answer": "3"}
    assert prompt_of(row, "alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd 1 and 2.\n\n### Response:"
    )
    assert "### Input:\n1, 2\n\n### Response:" in prompt_of(row | {"input": "1, 2"}, "alpaca")


@pytest.mark.parametrize("template", TEMPLATES)
def test_braces_in_a_row_are_text(template):
    assert "{x}" in prompt_of({"instruction": "f{x}", "input": "{0}"}, template)


def test_completion_starts_with_one_space():
    assert completion_of({"output": "\nA: 3\n"}) == " A: 3"


def test_prompt_and_completion_tokenise_apart(tiny_tokenizer):
    example = example_of({"instruction": "1+2", "input": "", "output": "\n3", "answer": "3"}, "alpaca")
    whole = tiny_tokenizer(example["prompt"] + example["completion"])["input_ids"]
    prompt = tiny_tokenizer(example["prompt"])["input_ids"]
    assert whole[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"instruction": "q", "output": "o", "answer": 4.0}, ("q", "o", "4")),
        ({"question": "q", "answer": "so <<1+1=2>>2\n#### 1,002"}, ("q", "so <<1+1=2>>2\n#### 1,002", "1,002")),
        ({"question": "q", "answer": "yes"}, ("q", "yes", "yes")),
        ({"Body": "b.", "Question": "q?", "Answer": 51.0}, ("b. q?", "The answer is 51.", "51")),
    ],
)
def test_dialects(tmp_path, fields, expected):
    (row,) = load_rows(str(write(tmp_path / "train.jsonl", fields)), split="train")
    assert (row["instruction"], row["output"], row["answer"]) == expected


def test_prompt_and_completion_are_kept_as_they_are(tmp_path):
    (row,) = load_rows(str(write(tmp_path / "a.jsonl", {"prompt": "p\n", "completion": "c"})), split="train")
    assert example_of(row, "alpaca") == {"prompt": "p\n", "completion": "c"}


def test_chat_becomes_a_conversational_example(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (row,) = load_rows(str(write(tmp_path / "a.jsonl", {"messages": messages})), split="train")
    assert example_of(row, "alpaca") == {"prompt": messages[:1], "completion": messages[1:]}


def test_a_folder_gives_the_split_asked_for(tmp_path):
    for name in ("train_a", "train_b", "test"):
        write(tmp_path / f"{name}.jsonl", {"instruction": name, "output": "o"})
    assert [row["instruction"] for row in load_rows(str(tmp_path), split="train")] == ["train_a", "train_b"]
    assert [row["instruction"] for row in load_rows(str(tmp_path), split="test")] == ["test"]


def test_a_json_list_is_read(tmp_path):
    file = tmp_path / "train.json"
    file.write_text(json.dumps([{"instruction": "i", "output": "o"}] * 3))
    assert len(load_rows(str(file), split="train")) == 3


def test_limit_draws_by_seed(tmp_path):
    file = write(tmp_path / "train.jsonl", *({"instruction": str(i), "output": "o"} for i in range(20)))
    first, again, other = (load_rows(str(file), split="train", limit=5, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 5


def test_bundled_tasks_share_the_limit():
    rows = load_rows("tasks:all", split="train", limit=50, seed=3)
    assert len(rows) == 50
    assert len({row["task"] for row in rows}) > 5
    assert rows == load_rows("tasks:all", split="train", limit=50, seed=3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "i"}', r"line 2: found the fields \['instruction'\], but needed one of"),
        ('{"instruction": "i", "output": " "}', "line 2: the field 'output' is empty"),
        ('{"instruction": "", "output": "o"}', "line 2: the field 'instruction' is empty"),
        ('{"instruction": ["i"], "output": "o"}', "line 2: the field 'instruction' must be text"),
        ('{"instruction": "i", ', "line 2: not JSON"),
        ("[1]", "line 2: a row must be a JSON object, not list"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "line 2: the field 'messages' must list"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    file = tmp_path / "train.jsonl"
    file.write_text('{"instruction": "i", "output": "o"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        load_rows(str(file), split="train")
    assert str(file) in str(caught.value)


def test_empty_data_is_an_error(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="the data set is empty"):
        load_rows(str(tmp_path / "train.jsonl"), split="train")


def test_a_missing_file_offers_a_near_name(tmp_path):
    write(tmp_path / "train.jsonl", {})
    with pytest.raises(FileNotFoundError, match=r"did you mean 'train.jsonl'"):
        load_rows(str(tmp_path / "trian.jsonl"), split="train")
    with pytest.raises(FileNotFoundError, match=r"has no test.jsonl.*it has train.jsonl"):
        load_rows(str(tmp_path), split="test")


def test_an_unknown_task_offers_a_near_name():
    from moa.tasks import TASKS

    name = next(iter(TASKS))
    with pytest.raises(ValueError, match=f"did you mean '{name}'"):
        load_rows(f"tasks:{name}x", split="train")


def test_an_unreachable_hub_name_is_one_line():
    with pytest.raises(ValueError, match="no local path and could not be loaded from the hub") as caught:
        load_rows("nobody/nothing", split="train")
    assert "\n" not in str(caught.value)
