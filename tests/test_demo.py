"""The demonstration, shortened: its numbers are measured, its adapter is real, its examples come from elsewhere."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from moa import demo as parts
from moa.cli.demo import comparison, show
from moa.cli.heatmap import heatmap
from moa.evaluation.accuracy import Item, Result
from moa.evaluation.answers import is_correct
from moa.evaluation.sets import EvaluationSet
from moa.tasks import SUITE, generate
from moa.training.recipe import Recipe

ROWS = 2


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Recipe, str, list[str]]:
    """A demonstration with three steps on a tiny base: recipe, terminal output, answers of the fresh process."""
    output = tmp_path_factory.mktemp("demo") / "adapter"
    changes = {
        "base": str(tiny_base),
        "max_steps": "3",
        "batch_size": "4",
        "data.limit": "36",
        "data.max_length": "400",
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
    for task in SUITE:
        assert task in text
    for row in parts.shown_rows(parts.test_sets(ROWS, recipe.seed)):
        assert row["instruction"][:40] in text
    assert "block 1" in text
    assert f"moa generate {folder}" in text


@pytest.mark.slow
def test_accuracies_are_those_of_the_kept_answers(shown: tuple[Recipe, str, list[str]]):
    recipe, *_ = shown
    for name, adapter in (("before", None), ("after", recipe.output)):
        kept = json.loads((Path(recipe.output) / f"accuracy_{name}.json").read_text())
        assert kept["settings"]["adapter"] == adapter
        assert kept["sets"].keys() == SUITE.keys()
        for task, found in kept["sets"].items():
            golds = [row["answer"] for row in generate(task, "test", ROWS, recipe.seed)]
            assert sorted(item["gold"] for item in found["items"]) == sorted(golds)
            right = [is_correct(found["kind"], item["text"], item["gold"]) for item in found["items"]]
            assert found["accuracy"] == sum(right) / ROWS


@pytest.mark.slow
def test_a_fresh_process_answers_as_this_one(shown: tuple[Recipe, str, list[str]]):
    recipe, _, answers = shown
    kept = json.loads((Path(recipe.output) / "accuracy_after.json").read_text())
    rows = parts.shown_rows(parts.test_sets(ROWS, recipe.seed))
    here = {item["prompt"]: item["text"] for found in kept["sets"].values() for item in found["items"]}
    for row, answer in zip(rows, answers, strict=True):
        (same,) = [text for prompt, text in here.items() if row["instruction"] in prompt]
        assert answer == same


@pytest.mark.slow
def test_a_broken_adapter_fails_in_the_fresh_process_with_its_reason(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"adapter_config\.json is missing"):
        parts.answers_of_fresh_process(tmp_path, ["1 + 1?"])


def test_a_folder_that_is_not_a_demo_is_left_alone(tmp_path: Path, tiny_base: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    recipe = parts.recipe_of(tmp_path, 0, {"base": str(tiny_base)})
    with pytest.raises(ValueError, match="not made by moa"):
        show(recipe, 1, Console(file=io.StringIO()))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_comparison_shows_what_was_measured():
    def outcome(name: str, family: str, right: int, n: int = 4) -> tuple[EvaluationSet, Result]:
        items = [Item("", "", "", "", place < right) for place in range(n)]
        return EvaluationSet(name, family, "text", 0.25, 8, []), Result("text", items)

    before = [outcome("a", "math", 0), outcome("b", "math", 2), outcome("c", "commonsense", 1)]
    after = [outcome("a", "math", 2), outcome("b", "math", 4), outcome("c", "commonsense", 3)]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(comparison(before, after))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["a", "math", "25%", "0%", "50%", "15", "to", "85", "4"] in lines
    assert ["mean", "math", "25%", "75%", "+50", "points"] in lines
    assert ["mean", "all", "25%", "75%", "+50", "points"] in lines


def test_heatmap_colours_follow_the_numbers():
    console = Console(width=60, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(heatmap([[0.0, 0.5], [1.0, 0.5]], ["block 0", "block 1"], ["q", "parallel"]))
    styled = console.export_text(styles=True)
    assert "48;2;68;1;84" in styled  # the lowest, dark
    assert "48;2;253;231;37" in styled  # the highest, bright
    assert styled.count("48;2;33;145;140") == 2
    console.print(heatmap([[0.5]], ["block 0"], ["q"]))  # one value: no division by zero
