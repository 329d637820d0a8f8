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


def test_a_folder_with_a_split_in_both_formats_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", {"instruction": "i", "output": "o"})
    (tmp_path / "train.json").write_text(json.dumps([{"instruction": "i", "output": "o"}]))
    with pytest.raises(ValueError, match=r"both train\.json and train\.jsonl"):
        load_rows(str(tmp_path), split="train")


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"question": "q", "context": "c", "answer": "a", "id": 3}, ["context", "id"]),
        ({"question": "q", "input": "c", "answer": "a", "empty": ""}, ["input"]),
        ({"instruction": "q", "input": "c", "output": "a", "system": "s"}, ["system"]),
        ({"instruction": "q", "input": "c", "output": "a", "answer": "b", "task": "t"}, []),
        ({"prompt": "q", "completion": "c", "history": [["a", "b"]]}, ["history"]),
        ({"Body": "b", "Question": "q", "Answer": 3.0, "ID": "x"}, ["ID"]),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 3}, []),
    ],
)
def test_fields_that_nothing_reads_are_told_once(tmp_path, capsys, row, unused):
    file = write(tmp_path / "rows.jsonl", row, row)
    load_rows(str(file), split="train")
    said = capsys.readouterr().out
    assert said == (f"note: {file}: the fields {unused} are not read\n" if unused else "")


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
        ('{"instruction": "i", "output": "o", "output": "p"}', "line 2: not JSON .the key 'output' is there twice"),
        ("[1]", "line 2: a row must be a JSON object, not list"),
        ('{"instruction": ' + "9" * 5000 + "}", "line 2: .*Exceeds the limit"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "line 2: the field 'messages' must list at least two"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    file = tmp_path / "train.jsonl"
    file.write_text('{"instruction": "i", "output": "o"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        load_rows(str(file), split="train")
    assert str(file) in str(caught.value)


USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
NO_TEXT = "half \ud83d of it"
INFINITE = float("inf")
BAD = [
    # Missing values: absent in every dialect, never the words "None" or "nan".
    ({"instruction": None, "output": "o"}, "found the fields"),
    ({"instruction": float("nan"), "output": "o"}, "found the fields"),
    ({"instruction": "i", "output": float("nan")}, "found the fields"),
    ({"instruction": "i", "output": None, "answer": "4"}, "the field 'output' is empty"),
    ({"question": "q", "answer": None}, "found the fields"),
    ({"Body": "b", "Question": "q", "Answer": float("nan")}, "found the fields"),
    ({"prompt": "p", "completion": None}, "found the fields"),
    ({"messages": None}, "found the fields"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, r"'messages\[1\]' must have a 'content' of text"),
    ({"messages": [USER, {"role": "assistant", "content": float("nan")}]}, r"messages\[1\]' must have a 'content'"),
    # Empty answers and questions.
    ({"instruction": "i", "output": " \n"}, "the field 'output' is empty"),
    ({"question": "q", "answer": " "}, "the field 'answer' is empty"),
    ({"question": "q", "answer": "so it is\n#### "}, "the field 'answer' has nothing after its '####'"),
    ({"Body": "b", "Question": "q", "Answer": ""}, "the field 'Answer' is empty"),
    ({"prompt": "p", "completion": "\n"}, "the field 'completion' is empty"),
    ({"prompt": " ", "completion": "c"}, "the field 'prompt' is empty"),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, r"the field 'messages\[1\].content' is empty"),
    ({"messages": [{"role": "user", "content": ""}, ASSISTANT]}, r"the field 'messages\[0\].content' is empty"),
    # Numbers that are none.
    ({"instruction": "i", "output": INFINITE}, "the field 'output' is inf, which is no finite number"),
    ({"question": "q", "answer": -INFINITE}, "the field 'answer' is -inf"),
    ({"Body": "b", "Question": "q", "Answer": INFINITE}, "the field 'Answer' is inf"),
    ({"prompt": "p", "completion": INFINITE}, "the field 'completion' is inf"),
    ({"messages": [USER, ASSISTANT], "tools": [{"top": [INFINITE]}]}, r"'columns.tools\[0\].top\[0\]' is inf"),
    # Text that no file can hold.
    ({"instruction": NO_TEXT, "output": "o"}, r"'instruction' has half of a surrogate pair, '\\ud83d' at character 6"),
    ({"question": "q", "answer": NO_TEXT}, "'answer' has half of a surrogate pair"),
    ({"Body": NO_TEXT, "Question": "q", "Answer": 1}, "'Body' has half of a surrogate pair"),
    ({"prompt": "p", "completion": NO_TEXT}, "'completion' has half of a surrogate pair"),
    ({"messages": [USER, ASSISTANT | {"content": NO_TEXT}]}, r"'messages\[1\].content' has half of a surrogate pair"),
    ({"messages": [USER, ASSISTANT | {NO_TEXT: "x"}]}, "has half of a surrogate pair"),
    # Columns that only a chat template reads.
    ({"instruction": "i", "output": "o", "tools": [{"name": "f"}]}, "'tools' is read by chat templates alone"),
    ({"prompt": "p", "completion": "c", "chat_template_kwargs": {"a": 1}}, "'chat_template_kwargs' is read by chat"),
    ({"messages": [USER, ASSISTANT], "tools": "f(x)"}, "'tools': not JSON"),
    ({"messages": [USER, ASSISTANT], "tools": '[{"type": 1, "type": 2}]'}, "the key 'type' is there twice"),
    ({"messages": [USER, ASSISTANT], "tools": {"name": "f"}}, "'tools' must be a list, not dict"),
    ({"messages": [USER, ASSISTANT], "documents": ["text"]}, "'documents' must list objects"),
    ({"messages": [USER, ASSISTANT], "chat_template_kwargs": {"tokenize": 1}}, "'tokenize' cannot be set by a row"),
    ({"messages": [USER, ASSISTANT], "chat_template": "{{ x }}"}, "'chat_template' cannot be set by a row"),
    # Chats that are none.
    ({"messages": [ASSISTANT, USER]}, "the last message is from 'user'"),
    ({"messages": [USER, {"content": "a"}]}, r"'messages\[1\]' must have a 'role'"),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(("fields", "message"), BAD)
def test_the_rules_hold_in_every_dialect(tmp_path, suffix, fields, message):
    file = tmp_path / f"train{suffix}"
    good = {"instruction": "i", "output": "o"}
    if suffix == ".jsonl":
        write(file, good, fields)
    else:
        file.write_text(json.dumps([good, fields]))
    with pytest.raises(ValueError, match=message) as caught:
        load_rows(str(file), split="train")
    assert f"{file}, {'line' if suffix == '.jsonl' else 'row'} 2: " in str(caught.value)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_what_is_missing_is_absent(tmp_path, missing):
    good = [
        {"instruction": "i", "input": missing, "output": "o", "answer": missing, "messages": missing, "tools": missing},
        {"prompt": "i", "completion": "o", "answer": missing, "chat_template_kwargs": missing},
        {"messages": [USER | {"name": None}, ASSISTANT], "tools": missing, "documents": missing, "mood": missing},
    ]
    first, second, third = load_rows(str(write(tmp_path / "a.jsonl", *good)), split="train")
    assert first == {"instruction": "i", "input": "", "output": "o", "answer": ""}
    assert second == {"prompt": "i", "output": "o", "answer": ""}
    assert third.pop("place") == f"{tmp_path / 'a.jsonl'}, line 3"
    assert third == {"messages": [USER, ASSISTANT], "output": "a", "answer": ""}


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_answer_to_compare_with_is_refused(tmp_path, split):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    file = write(tmp_path / "a.jsonl", {"messages": [USER, call], "tools": "[]"})
    if split == "train":  # a call is something to learn
        assert load_rows(str(file), split=split)[0]["messages"] == [USER, call]
        return
    with pytest.raises(ValueError, match="line 1: neither an answer nor an output"):
        load_rows(str(file), split=split)


def test_what_a_chat_template_may_read_is_kept(tmp_path):
    tools = [{"name": "f"}]
    fields = {"messages": [USER, ASSISTANT], "answer": 4.0, "chat_template_kwargs": '{"thinking": false}', "tag": "x"}
    file = write(tmp_path / "a.jsonl", fields | {"tools": tools}, fields | {"tools": json.dumps(tools)})
    for row in load_rows(str(file), split="train"):
        assert row["columns"] == {"tools": tools, "thinking": False, "tag": "x"}
        assert row["answer"] == "4"


def test_a_table_has_null_where_a_row_has_nothing(monkeypatch):
    import datasets

    schema = {"type": "object", "properties": {"x": None, "y": {"type": "int"}}}
    rows = [{"messages": [USER | {"tool_calls": None}, ASSISTANT], "tools": [{"name": "f", "schema": schema}]}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    (row,) = load_rows("owner/name", split="train")
    assert row["messages"] == [USER, ASSISTANT]
    assert row["columns"]["tools"][0]["schema"]["properties"] == {"y": {"type": "int"}}


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_byte_order_mark_is_no_content(tmp_path, suffix):
    row = {"instruction": "añb", "output": "c"}
    text = json.dumps(row, ensure_ascii=False) + "\r\n" if suffix == ".jsonl" else json.dumps([row])
    file = tmp_path / f"train{suffix}"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_rows(str(file), split="train")[0]["instruction"] == "añb"


def test_a_task_gives_what_it_has_and_says_so(capsys):
    rows = load_rows("tasks:fact_choice", split="test")
    assert 900 < len({row["instruction"] for row in rows}) == len(rows) < 1000
    assert f"task 'fact_choice' has {len(rows)} distinct test rows, fewer than 1000: all are taken" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("limit", [0, 2.5])
def test_a_limit_is_a_whole_number(limit):
    with pytest.raises(ValueError, match=f"limit={limit} "):
        load_rows("tasks:all", split="train", limit=limit)


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
