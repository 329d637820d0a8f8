"""Studies of attention spans: a plan, a baseline or a press is a method like any other."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moa.assets import base_path
from moa.evaluation.accuracy import evaluate
from moa.evaluation.retrieval import text_losses
from moa.spans import SpanPlan, apply_spans
from moa.spans.baselines import uniform_window
from moa.studies.cells import TEST, Cell
from moa.studies.conduct import conduct, job
from moa.studies.engine import Engine
from moa.studies.plan import Plan, plan
from moa.studies.report import markdown, write_report
from moa.studies.results import gather
from moa.studies.runner import run
from moa.studies.study import Study
from moa.training.base import load_base


@pytest.fixture
def tree(tiny_base: Path, tmp_path: Path) -> dict[str, Any]:
    """A study of a few long prompts on a model that knows nothing, as plain data."""
    (tmp_path / "plain.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return {
        "output": str(tmp_path / "out"),
        "base": str(tiny_base),
        "budgets": [0.5],
        "seeds": [0],
        "batch_size": 2,
        "metrics": ["accuracy", "answer_loss", "text_loss"],
        "training": {"dtype": "float32"},
        "data": {"test": ["long:lines@256", f"text:{tmp_path}/plain.txt@256"], "test_rows": 4},
        "methods": {"dense": {"spans": "dense"}, "uniform": {"spans": "uniform"}},
        "claims": [{"better": "uniform", "than": ["dense"], "metric": "text_loss"}],
    }


def result_of(planned: Plan, method: str) -> dict[str, Any]:
    return run(job(planned, Cell(TEST, method, planned.study.budgets[0], 0, 0.0)))


def test_a_plan_is_measured_as_it_is_used(tree, tiny_base):
    planned = plan(Study(**tree))
    found = {method: result_of(planned, method)["sets"] for method in ("dense", "uniform")}
    (data,), (text,) = planned.rows.sets, planned.rows.texts
    model, tokenizer = load_base(str(tiny_base), "float32")
    losses = text_losses(model, tokenizer, text)
    with apply_spans(model, uniform_window(model, 0.5, 256)):
        under = text_losses(model, tokenizer, text)
        outcome = evaluate(
            model, tokenizer, data.rows, template="short", kind="begins", max_new_tokens=data.max_new_tokens
        )
    assert found["dense"]["plain-256"]["text_loss"] == pytest.approx(losses, abs=1e-5)
    assert found["uniform"]["plain-256"]["text_loss"] == pytest.approx(under, abs=1e-5)
    assert losses != under
    assert found["uniform"]["lines-256"]["accuracy"] == [int(item.correct) for item in outcome.items]
    assert found["uniform"]["lines-256"]["kv_share"] == 0.5
    assert "kv_share" not in found["dense"]["lines-256"]
    assert found["uniform"]["lines-256"]["answer_loss"] != found["dense"]["lines-256"]["answer_loss"]


def test_it_ends_in_the_same_table_and_page(tree, tmp_path):
    planned = plan(Study(**tree))
    assert conduct(planned, engine=Engine(), progress=lambda state: None) == []
    results = gather(planned)
    assert results["claims"][0]["comparisons"][0]["budget"] == 0.5
    page = write_report(results, tmp_path / "index.html").read_text()
    assert "dense at 50 % of the KV cache" in page
    assert "Every method trains" not in page
    assert "| method | budget | KV % | accuracy % | answer loss | text loss | MiB |" in markdown(results)


def test_an_adapter_may_learn_under_a_plan_and_be_measured_under_another(tree, tiny_base, tmp_path):
    model, _ = load_base(str(tiny_base), "float32")
    file, other = tmp_path / "half.json", tmp_path / "all.json"
    uniform_window(model, 0.5, 256).save(file)
    SpanPlan.dense(2, 2).save(other)
    tree |= {
        "budgets": [8000],
        "tolerance": 0.1,
        "steps": 2,
        "metrics": ["text_loss"],
        "data": tree["data"] | {"train": ["long:lines@250"], "train_rows": 12, "validation_rows": 4, "max_length": 256},
        "tuning": {"learning_rates": [0.01]},
        "methods": {
            "under": {"preset": "lora", "training": {"spans": str(file)}},
            "practice": {"preset": "lora", "spans": str(file)},
            "released": {"preset": "lora", "spans": "dense", "training": {"spans": str(file)}},
        },
        "claims": [],
    }
    planned = plan(Study(**tree))
    cells = {method: Cell(TEST, method, 8000, 0, 0.01) for method in planned.methods}
    texts = {method: run(job(planned, cell))["sets"]["plain-256"] for method, cell in cells.items()}
    assert {method: text.get("kv_share") for method, text in texts.items()} == {
        "under": 0.5,
        "practice": 0.5,
        "released": None,
    }
    assert len({tuple(text["text_loss"]) for text in texts.values()}) == 3
    before = {method: planned.configuration(cell) for method, cell in cells.items()}
    file.write_bytes(other.read_bytes())  # another plan of the same name: cells have to be run again
    again = plan(Study(**tree))
    assert all(again.configuration(cell) != before[method] for method, cell in cells.items())


def test_a_press_acts_on_answers_one_by_one_and_has_no_losses(tree, monkeypatch):
    made = []

    class Press:
        def __init__(self, compression_ratio: float):
            self.inside = False
            made.append((self, compression_ratio))

        @contextmanager
        def __call__(self, model):
            self.inside, model.pressed = True, self
            yield
            self.inside = False

    package = ModuleType("kvpress")
    package.SnapKVPress = Press
    monkeypatch.setitem(sys.modules, "kvpress", package)
    seen = []

    def generate(model, tokenizer, prompts, *, max_new_tokens, batch_size):
        seen.append((model.pressed.inside, batch_size))
        yield list(range(len(prompts))), ["nothing"] * len(prompts)

    monkeypatch.setattr("moa.evaluation.accuracy.generate", generate)
    tree["methods"]["snapkv"] = {"spans": "kvpress:SnapKVPress"}
    sets = result_of(plan(Study(**tree | {"budgets": [0.25]})), "snapkv")["sets"]
    assert seen == [(True, 1)]
    assert {ratio for _, ratio in made} == {0.75}
    assert set(sets["lines-256"]) == {"family", "kind", "chance", "rows", "accuracy", "kv_share"}
    assert "text_loss" not in sets["plain-256"]
    tree["methods"]["wrong"] = {"spans": "kvpress:SnapPress"}
    planned = plan(Study(**tree))
    with pytest.raises(ValueError, match="kvpress has no 'SnapPress'"):
        result_of(planned, "wrong")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"spans": "serached"}, r"spans='serached' is not one of .*kvpress:CLASS.*did you mean 'searched'"),
        ({"preset": "lora", "spans": "searched"}, r".*a budget is one or the other\. Make the plan first"),
        ({"preset": "lora"}, r"its budgets must be numbers of trained parameters, not \[0.5\]"),
        ({"spans": "uniform", "r": 3}, r"preset 'none' trains nothing, so it takes no \['r'\]"),
    ],
)
def test_what_does_not_go_together_is_refused(tree, method, message):
    with pytest.raises(ValueError, match=f"methods.wrong: {message}"):
        Study(**tree | {"methods": {"wrong": method}, "claims": []})


def test_numbers_of_parameters_are_no_shares(tree):
    with pytest.raises(ValueError, match=r"methods\.uniform: its budgets must be shares of the KV cache"):
        Study(**tree | {"budgets": [8000]})


def test_a_missing_plan_stops_a_study_before_it_starts(tree):
    tree["methods"] = {"mine": {"spans": "nowhere.json"}}
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        plan(Study(**tree | {"claims": []}))


@pytest.mark.slow
def test_a_searched_plan_is_made_once_per_seed(tree):
    tree |= {
        "base": "embedded-long",
        "data": {"test": ["long:lines@256", "text:novels@256"], "test_rows": 6},
        "calibration": {
            **{"lengths": [256], "validate_length": 512, "items": 6, "validate_items": 3, "max_new_tokens": 24},
            "step": 64,
        },
        "methods": {"searched": {"spans": "searched"}, "two-class": {"spans": "two-class"}},
        "claims": [],
    }
    planned = plan(Study(**tree))
    first = result_of(planned, "searched")
    files = {path: path.read_bytes() for path in (planned.folder / "spans").glob("seed-0-*/*.*")}
    assert {path.name for path in files} >= {"calibration.jsonl", "plan-0.5.json", "influence-256.safetensors"}
    assert result_of(planned, "searched")["sets"] == first["sets"]
    assert 0.4 <= first["sets"]["lines-256"]["kv_share"] <= 0.5
    two = result_of(planned, "two-class")
    assert two["sets"]["novels-256"]["kv_share"] <= 0.5
    assert {path: path.read_bytes() for path in files} == files
    assert base_path("embedded-long").is_dir()
    other = plan(Study(**tree | {"calibration": tree["calibration"] | {"step": 256}}))
    result_of(other, "searched")
    found = [json.loads(path.read_text()) for path in planned.folder.glob("spans/*/plan-0.5.json")]
    assert {one["searched"]["limits"]["step"] for one in found} == {64, 256}
