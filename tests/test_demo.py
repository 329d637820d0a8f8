"""The demonstration, shortened: its numbers are measured, its adapter is real, its examples come from elsewhere."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moa import demo as parts
from moa.cli.demo import comparison, show, side_by_side
from moa.cli.heatmap import heatmap
from moa.data import load_rows
from moa.evaluation.accuracy import Item, Result
from moa.evaluation.answers import is_correct
from moa.tasks import generate
from moa.tasks.bookings import EXPLANATION, FIELDS, INSTRUCTION
from moa.training.recipe import Recipe

ROWS = 3
CHATML = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable, tiny_tokenizer: Any) -> Path:
    """A tiny base model with a chat template and room for the untuned model's long prompt."""
    folder = tmp_path_factory.mktemp("base") / "chat"
    tiny_llama(max_position_embeddings=8192).save_pretrained(folder)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, chat_base: Path) -> tuple[Recipe, str, list[str]]:
    """A demonstration with three steps on a tiny base: recipe, terminal output, answers of the fresh process."""
    output = tmp_path_factory.mktemp("demo") / "adapter"
    changes = {
        "base": str(chat_base),
        "dtype": "float32",
        "max_steps": "3",
        "batch_size": "4",
        "data.limit": "12",
        "data.max_length": "800",
        "adapter.length": "2",
        "adapter.size": "4",
    }
    recipe = parts.recipe_of(output, 3, changes)
    console = Console(width=100, record=True, file=io.StringIO())
    answers: list[str] = []
    fresh_process = parts.answers_of_fresh_process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            parts, "answers_of_fresh_process", lambda *given: answers.extend(fresh_process(*given)) or answers
        )
        show(recipe, ROWS, console)
    return recipe, console.export_text(), answers


@pytest.mark.slow
def test_the_whole_demonstration(shown: tuple[Recipe, str, list[str]]):
    recipe, text, _ = shown
    folder = Path(recipe.output)
    assert {"adapter_config.json", "adapter_model.safetensors", "recipe.yaml"} <= {
        file.name for file in folder.iterdir()
    }
    for field in (*FIELDS, "all of them"):
        assert field in text
    for row in parts.test_set(ROWS, recipe.seed).rows:
        assert row["instruction"].removeprefix(INSTRUCTION).strip()[:40] in text
    assert "block 1" in text
    assert f"moa generate {folder}" in text


@pytest.mark.slow
def test_accuracies_are_those_of_the_kept_answers(shown: tuple[Recipe, str, list[str]]):
    recipe, *_ = shown
    rows = {row["answer"]: row for row in generate("bookings", "test", ROWS, recipe.seed)}
    for name, adapter in (("before", None), ("after", recipe.output)):
        kept = json.loads((Path(recipe.output) / f"accuracy_{name}.json").read_text())
        assert kept["settings"]["adapter"] == adapter
        found = kept["sets"]["bookings"]
        assert {item["gold"] for item in found["items"]} == rows.keys()
        right = [is_correct("json", item["text"], item["gold"]) for item in found["items"]]
        assert found["accuracy"] == sum(right) / ROWS
        assert kept["fields"].keys() == set(FIELDS)
        for item in found["items"]:
            asked = rows[item["gold"]]["instruction"]
            assert item["prompt"].count("[user]") == (1 if adapter else 1 + parts.SOLVED)
            assert item["prompt"].count(EXPLANATION) == (0 if adapter else 1 + parts.SOLVED)
            assert item["prompt"].endswith(asked.removeprefix(INSTRUCTION) + "</s>[assistant]")


@pytest.mark.slow
def test_a_fresh_process_answers_as_this_one(shown: tuple[Recipe, str, list[str]]):
    recipe, _, answers = shown
    kept = json.loads((Path(recipe.output) / "accuracy_after.json").read_text())
    assert answers == [item["text"] for item in kept["sets"]["bookings"]["items"]]


def test_the_untuned_model_is_shown_solved_training_requests():
    data = parts.test_set(2, 0)
    solved = load_rows(parts.SOURCE, split="train", limit=parts.SOLVED, seed=0)
    for row, told in zip(data.rows, parts.explained(data, 0).rows, strict=True):
        contents = [message["content"] for message in told["messages"]]
        assert contents[1:-2:2] == [row["output"] for row in solved]
        assert contents[-1] == told["answer"] == row["answer"]
        assert all(content.startswith(EXPLANATION) for content in contents[::2])


@pytest.mark.slow
def test_a_broken_adapter_fails_in_the_fresh_process_with_its_reason(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"adapter_config\.json is missing"):
        parts.answers_of_fresh_process(tmp_path, ["1 + 1?"], "float32")


def test_a_folder_that_is_not_a_demo_is_left_alone(tmp_path: Path, tiny_base: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    recipe = parts.recipe_of(tmp_path, 0, {"base": str(tiny_base)})
    with pytest.raises(ValueError, match="not made by moa"):
        show(recipe, 1, Console(file=io.StringIO()))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_comparison_shows_what_was_measured():
    def result(*texts: str) -> Result:
        gold = '{"a": 1, "b": 2}'
        return Result("json", [Item("", gold, text, text, is_correct("json", text, gold)) for text in texts])

    before = result('{"a": 1}', "none", "{}", '{"b": 2}')
    after = result('{"a": 1, "b": 2}', '{"a": 1, "b": 2}', '{"a": 1, "b": 3}', '{"b": 2, "a": 1}')
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(comparison(before, after))
    text = console.export_text()
    lines = [line.split() for line in text.splitlines()]
    assert ["a", "25%", "100%"] in lines
    assert ["b", "25%", "75%"] in lines
    assert ["all", "of", "them", "0%", "75%", "30", "to", "95", "4"] in lines
    assert "+75 points" in text


def test_answers_side_by_side_are_judged_field_by_field():
    console = Console(width=100, record=True, file=io.StringIO(), force_terminal=True)
    console.print(side_by_side('{"a": "x", "n": 90}', 'a = "x"', '{"n": "90", "a": "x"} and more'))
    plain = [line.split() for line in console.export_text(clear=False).splitlines()]
    assert ["a", '"x"', "-", '"x"'] in plain
    assert ["n", "90", "-", '"90"'] in plain
    styled = console.export_text(styles=True)
    assert '\x1b[32m"x"' in styled  # right
    assert '\x1b[31m"90"' in styled  # the number, but not as a number


def test_heatmap_colours_follow_the_numbers():
    console = Console(width=60, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(heatmap([[0.0, 0.5], [1.0, 0.5]], ["block 0", "block 1"], ["q", "parallel"]))
    styled = console.export_text(styles=True)
    assert "48;2;68;1;84" in styled  # the lowest, dark
    assert "48;2;253;231;37" in styled  # the highest, bright
    assert styled.count("48;2;33;145;140") == 2
    console.print(heatmap([[0.5]], ["block 0"], ["q"]))  # one value: no division by zero


@pytest.mark.parametrize(("emulated", "dtype"), [(True, "float32"), (False, "bfloat16")])
def test_it_runs_in_the_dtype_that_the_processor_has(emulated: bool, dtype: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(parts, "emulates_bfloat16", lambda: emulated)
    assert parts.recipe_of(tmp_path, 0).dtype == dtype
    assert parts.recipe_of(tmp_path, 0, {"dtype": "float32"}).dtype == "float32"
