"""Studies: what a file may say, sizes that meet a budget, cells that resume, and a page that states the verdict."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from moa.adapters.presets import PRESETS, adapter_config
from moa.assets import base_path
from moa.cli import app
from moa.data import load_rows
from moa.evaluation.likelihood import chosen
from moa.evaluation.results import PACKAGES, write
from moa.evaluation.retrieval import text_losses
from moa.studies import cells as grid
from moa.studies.budget import fit
from moa.studies.cells import TEST, Cell
from moa.studies.conduct import conduct, job, seconds_for
from moa.studies.data import has, load
from moa.studies.engine import Engine
from moa.studies.methods import Method
from moa.studies.plan import Plan, check_versions, plan
from moa.studies.report import markdown, write_report, write_results
from moa.studies.results import gather
from moa.studies.runner import run
from moa.studies.study import Study, StudyData
from moa.training.base import load_base
from moa.versions import versions

BENCHMARKS = Path(__file__).parents[1] / "benchmarks" / "studies"
OUTSIDE = ["peft:lora", "peft:dora", "peft:lily"]


@pytest.fixture
def tree(tiny_base: Path, tmp_path: Path) -> dict[str, Any]:
    """A study of seconds, as plain data."""
    for name, numbers in (("train", range(40)), ("asked", range(40, 52))):
        rows = [{"instruction": f"{n} + 1 = ?", "output": f"It is {n + 1}.", "answer": str(n + 1)} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "title": "A tiny study",
        "output": str(tmp_path / "out"),
        "base": str(tiny_base),
        "budgets": [8000],
        "seeds": [0, 1],
        "steps": 3,
        "batch_size": 4,
        "snapshots": 2,
        "data": {
            "train": [str(tmp_path / "train.jsonl")],
            "test": [str(tmp_path / "asked.jsonl")],
            "validation_rows": 8,
            "max_length": 64,
            "max_new_tokens": 3,
        },
        "tuning": {"learning_rates": [0.001, 0.01]},
        "training": {"dtype": "float32"},
        "methods": {
            "soft-moa": None,
            "nested": {"preset": "molora", "copies": 2},
            "lora": {"note": "plain"},
        },
        "claims": [{"better": "soft-moa", "than": ["nested", "lora"], "text": "Mixtures win <here>."}],
    }


# What a file may say


def test_a_study_survives_being_written_and_read(tree):
    study = Study(**tree)
    assert Study(**json.loads(json.dumps(asdict(study)))) == study
    assert study.methods["nested"].changes == {"copies": 2}
    assert study.methods["lora"].preset == "lora"


@pytest.mark.parametrize(("budget", "written"), [(8000.0, "8000"), (8000, "8000"), (0.5, "0.5")])
def test_a_methods_own_budgets_are_written_as_the_studys(tree, budget, written):
    methods = {"dense": {"spans": "dense", "budgets": [budget]}}
    study = Study(**tree | {"budgets": [budget], "methods": methods, "claims": []})
    for one in (study, Study(**json.loads(json.dumps(asdict(study))))):
        assert [cell.name for cell in grid.tests(one, ["dense"], {("dense", budget): 0.0})] == [
            f"test-dense-{written}-s0",
            f"test-dense-{written}-s1",
        ]


@pytest.mark.parametrize("name", sorted(file.stem for file in BENCHMARKS.glob("*.yaml")))
def test_committed_studies_are_valid(name):
    study = Study.load(BENCHMARKS / f"{name}.yaml")
    assert study.claims
    if name == "embedded":
        assert set(PRESETS) | set(OUTSIDE) <= set(study.methods)
        assert len(study.seeds) >= 5
        assert len(study.budgets) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stpes": 3}, "'stpes' .did you mean 'steps'"),
        ({"data": {"tets": []}}, "data has no key 'tets' .did you mean 'test'"),
        ({"data": 3}, "data must be a mapping"),
        ({"tuning": {"rates": [1]}}, "tuning has no key 'rates'"),
        ({"steps": "many"}, "steps='many' must be a whole number"),
        ({"steps": 1}, "steps=1 is outside"),
        ({"budgets": []}, "budgets=.. must list"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] must list"),
        ({"seeds": [1000]}, "tuning.seeds share"),
        ({"tuning": {"budget": 5}}, "tuning.budget=5 is not one of"),
        ({"metrics": ["acuracy"]}, "did you mean 'accuracy'"),
        ({"methods": {}}, "methods is empty"),
        ({"methods": {"soft-mao": None}}, "methods.soft-mao: there is no preset .*did you mean 'soft-moa'"),
        ({"methods": {"lora": {"rnk": 3}}}, "methods.lora: .*'rnk'"),
        ({"methods": {"lora": {"grow": ["prompt"]}}}, r"methods.lora: grow='prompt' is not one of \['lora'\]"),
        ({"methods": {"ia3": {"preset": "lora", "experts": ["ia3"]}}}, "methods.ia3: nothing can grow"),
        ({"methods": {"soft-moa": {"grow": ["lroa"]}}}, "methods.soft-moa: grow='lroa'.*did you mean 'lora'"),
        ({"methods": {"peft:lora": {"grow": ["lora"]}}}, "methods.peft:lora: grow=.* names experts of a mixture"),
        (
            {"methods": {"b": {"preset": "none", "learning_rates": [0.1]}}},
            r"methods.b: .*takes no \['learning_rates'\]",
        ),
        ({"methods": {"b": {"preset": "none", "grow": ["lora"], "r": 2}}}, r"methods.b: .*takes no \['r', 'grow'\]"),
        ({"methods": {"lora": {"budgets": [7]}}}, "methods.lora: budgets names 7"),
        ({"methods": {"lora": 4}}, "methods.lora=4 must be a section"),
        ({"methods": {"a b": {"preset": "lora"}}}, "'a b' must be up to 100 letters without spaces"),
        ({"methods": {"a\0b": {"preset": "lora"}}}, "must be up to 100 letters"),
        ({"methods": {"a" * 101: {"preset": "lora"}}}, "must be up to 100 letters"),
        ({"methods": {"lora": {"budgets": ["many"]}}}, r"methods.lora: budgets\[0\]='many' must be a number"),
        ({"methods": {"lora": {"spans": [1]}}}, r"methods.lora: spans=\[1\] must be text"),
        ({"methods": [1]}, "methods must be a mapping"),
        ({"claims": [{"better": "soft-moa", "than": ["molora"]}]}, "claims: than='molora' is not one of"),
        ({"claims": [{"better": "soft-moa", "than": ["soft-moa"]}]}, "better than itself"),
        ({"claims": [{"better": "lora"}]}, r"claims: than=\[\] must be a list of"),
        ({"claims": 3}, "claims must be a list"),
        ({"claims": [{"better": "lora", "than": ["nested"], "budgets": [5]}]}, "claims: budgets names 5"),
        ({"claims": [{"beter": "lora"}]}, "did you mean 'better'"),
        ({"claims": [{"better": "lora", "than": ["nested"], "metric": "loss"}]}, "claims: metric='loss'"),
        ({"training": {"learning_rate": 1}}, "'learning_rate'; a study sets it"),
        ({"training": {"schedul": "linear"}}, "did you mean 'schedule'"),
        ({"training": {"weight_decay": 2}}, "weight_decay=2.*outside"),
    ],
)
def test_a_wrong_study_says_what_is_wrong(tree, tmp_path, change, message):
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(tree | change))
    with pytest.raises(ValueError, match=f"wrong.yaml: .*{message}"):
        Study.load(file)


def test_files_that_are_no_studies(tree, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("a: [b")
    with pytest.raises(ValueError, match=r"mine\.yaml: not YAML"):
        Study.load(file)
    file.write_text("- 1")
    with pytest.raises(ValueError, match="the file must be a mapping"):
        Study.load(file)
    with pytest.raises(FileNotFoundError, match=r"did you mean .mine\.yaml."):
        Study.load(tmp_path / "mini.yaml")
    file.write_text(yaml.safe_dump(tree))
    assert Study.load(file, {"data.test_rows": "7", "steps": "9"}).data.test_rows == 7
    with pytest.raises(ValueError, match="not a section"):
        Study.load(file, {"steps.more": "1"})


# Sizes that meet a budget


def counted(section: dict[str, Any]) -> int:
    """What PEFT trains, without the solver's own counting."""
    config = AutoConfig.from_pretrained(base_path())
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), adapter_config(section))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("name", [*PRESETS, *OUTSIDE])
def test_every_method_meets_its_budget(name):
    for budget in (100_000, 230_000):
        found = fit(Method.from_tree(name, None), "embedded", budget)
        assert found.trained == counted(found.section)
        assert abs(found.trained - budget) <= 0.01 * budget


def test_sizes_keep_their_proportions_and_scalings():
    method = Method.from_tree("soft-moa", {"r": 4, "alpha": 8, "size": 16, "router": {"hidden_per_expert": 0}})
    found = fit(method, "embedded", 150_000)
    config = adapter_config(found.section)
    assert config.router.hidden_per_expert == 0
    ranks = {expert.r for expert in config.experts if expert.kind == "lora"}
    widths = {expert.size for expert in config.experts if expert.kind == "parallel"}
    assert max(ranks) - min(ranks) <= 1
    assert max(widths) / min(ranks) == pytest.approx(16 / 4, rel=0.15)
    assert {expert.scaling for expert in config.experts if expert.kind == "lora"} == {2.0}
    places = [
        (target, layer)
        for e in config.experts
        if e.kind == "lora"
        for target in e.targets
        for layer in e.layers or range(4)
    ]
    assert sorted(places) == sorted((target, layer) for target in ("q", "k", "v", "o", "down") for layer in range(4))


def test_only_what_may_grow_grows():
    found = fit(Method.from_tree("soft-moa", {"grow": ["parallel"]}), "embedded", 150_000)
    config = adapter_config(found.section)
    assert {expert.r for expert in config.experts if expert.kind == "lora"} == {8}
    assert {expert.length for expert in config.experts if expert.kind == "prompt"} == {10}


def test_what_cannot_be_met_says_what_can():
    with pytest.raises(ValueError, match=r"as few as 50,000.*it trains 8[12],"):
        fit(Method.from_tree("molora", None), "embedded", 50_000)
    with pytest.raises(ValueError, match="the nearest it reaches is"):
        fit(Method.from_tree("prompt", None), "embedded", 700)
    assert fit(Method.from_tree("molora", {"copies": 4}), "embedded", 50_000).trained == pytest.approx(50_000, rel=0.01)


def test_a_study_names_all_methods_that_miss(tree):
    study = Study(**tree | {"budgets": [600]})
    with pytest.raises(ValueError, match=r"(?s)soft-moa at 600: .*nested at 600: .*lora at 600: "):
        plan(study)


# Rows


def test_rows_are_held_out_and_test_rows_are_not_learned(tree, tmp_path):
    rows = load(StudyData(**tree["data"]), tree["base"])
    assert (len(rows.stages[0]), len(rows.validation), len(rows.sets[0].rows)) == (32, 8, 12)
    texts = [row["instruction"] for row in (*rows.stages[0], *rows.validation)]
    assert len(set(texts)) == 40
    with pytest.raises(ValueError, match=r"12 of the 12 test rows of .asked. are in data\.train"):
        load(StudyData(**tree["data"] | {"train": [*tree["data"]["train"], *tree["data"]["test"]]}), tree["base"])
    with pytest.raises(ValueError, match="leaves nothing to learn"):
        load(StudyData(**tree["data"] | {"validation_rows": 40}), tree["base"])


def test_rows_reach_training_as_they_were_read(tree, tmp_path):
    """Also those with a prompt of their own."""
    rows = [{"prompt": f"{n}\n->", "completion": f" {n}.\n"} for n in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in (str(tmp_path / "prompts.jsonl"), tree["data"]["train"][0], "long:lines@80"):
        data = StudyData(**tree["data"] | {"train": [source], "train_rows": 12})
        rows = load(data, tree["base"])
        (file,) = rows.training_files(tmp_path / "rows")
        assert load_rows(str(file), split="train") == rows.stages[0]


# Cells


@pytest.fixture
def planned(tree) -> Plan:
    return plan(Study(**tree))


def test_the_same_seed_gives_the_same_cell(planned):
    cell = Cell(TEST, "soft-moa", 8000, 0, 0.01)
    first, second = ({**run(job(planned, cell))} for _ in range(2))
    for timing in ("seconds", "cpu_seconds", "step_seconds", "peak_memory_mib"):
        assert first.pop(timing)
        assert second.pop(timing)
    assert first == second
    assert first["diverged"] is None
    (only,) = first["sets"].values()
    assert len(only["accuracy"]) == len(only["answer_loss"]) == 12
    assert [state["step"] for state in first["routing"]] == [2, 3]
    block = first["routing"][-1]["blocks"][0]
    assert set(block["gate"]) == {"q", "k", "v", "prompt", "o", "down", "parallel"}
    assert all(share == 1.0 for share in block["active"].values())
    assert block["dead"] == []
    other = run(job(planned, Cell(TEST, "soft-moa", 8000, 1, 0.01)))
    assert other["sets"] != first["sets"]
    assert not Path(job(planned, cell).recipes[0].output).exists()


@pytest.mark.parametrize("name", OUTSIDE)
def test_methods_of_peft_run_the_same_way(tree, name):
    tree |= {"methods": {"yardstick": {"preset": name}}, "claims": [], "tolerance": 0.1, "budgets": [9000]}
    planned = plan(Study(**tree))
    result = run(job(planned, Cell(TEST, "yardstick", 9000, 0, 0.01)))
    assert result["routing"] == []
    assert np.isfinite(result["sets"]["asked"]["answer_loss"]).all()
    assert result["step_seconds"] > 0


def test_a_run_that_diverges_is_a_result(planned):
    whole = job(planned, Cell(TEST, "lora", 8000, 0, 1.0))
    for expert in whole.recipes[0].adapter["experts"]:
        expert["alpha"] = 1e30
    result = run(whole)
    assert "step" in result["diverged"]
    assert sum(result["sets"]["asked"]["accuracy"]) == 0
    assert "answer_loss" not in result["sets"]["asked"]


def keep(planned: Plan, cell: Cell, result: dict[str, Any]) -> None:
    """A cell's file, as a worker writes it."""
    write(planned.path(cell), {"configuration": planned.configuration(cell)} | result)


def test_only_a_cell_of_the_same_configuration_counts(planned, tree):
    cell = Cell(TEST, "lora", 8000, 0, 0.01)
    assert planned.finished([cell]) == {}
    keep(planned, cell, {"answer": 42})
    assert planned.finished([cell])[cell]["answer"] == 42
    for change in (
        {"steps": 4},
        {"training": {"weight_decay": 0.5}},
        {"methods": {"lora": {"alpha": 9}}, "claims": []},
    ):
        assert plan(Study(**tree | change)).finished([cell]) == {}
    assert plan(Study(**tree | {"title": "Another", "seeds": [0, 1, 2]})).finished([cell])
    file = Path(tree["data"]["train"][0])
    file.write_text(file.read_text() + json.dumps({"instruction": "new", "output": "row"}) + "\n")
    assert plan(Study(**tree)).finished([cell]) == {}
    planned.path(cell).write_text('{"configuration": {')
    assert planned.finished([cell]) == {}


def test_every_method_gets_the_same_tries_and_the_best_rate(planned):
    methods = planned.methods
    tries = grid.tries(planned.study, methods)
    assert {name: sum(cell.method == name for cell in tries) for name in methods} == dict.fromkeys(methods, 2)
    losses = {cell: {"validation_loss": abs(cell.learning_rate - 0.01)} for cell in tries}
    losses[next(cell for cell in tries if cell.method == "lora" and cell.learning_rate == 0.01)]["validation_loss"] = (
        None
    )
    rates = grid.choose_rates(planned.study, methods, losses)
    assert rates == {("soft-moa", 8000): 0.01, ("nested", 8000): 0.01, ("lora", 8000): 0.001}
    with pytest.raises(ValueError, match="soft-moa at 8,000 parameters diverged at every rate"):
        grid.choose_rates(planned.study, methods, {cell: {"validation_loss": None} for cell in tries})
    names = [cell.name for cell in (*tries, *grid.tests(planned.study, methods, rates))]
    assert len(set(names)) == len(names) == 6 + 6


def test_a_method_may_have_rates_of_its_own(tree):
    tree["methods"] = {
        "soft-moa": None,
        "lora": {"learning_rates": [0.02]},
        "nested": {"preset": "molora", "copies": 2},
    }
    tree["methods"]["nested"]["learning_rates"] = [0.1, 0.2]
    study = Study(**tree)
    assert Study(**asdict(study)) == study
    methods = list(study.methods)
    tries = grid.tries(study, methods)
    assert {(cell.method, cell.learning_rate) for cell in tries} == {
        ("soft-moa", 0.001), ("soft-moa", 0.01), ("nested", 0.1), ("nested", 0.2)
    }  # fmt: skip
    rates = grid.choose_rates(study, methods, {cell: {"validation_loss": cell.learning_rate} for cell in tries})
    assert rates == {("soft-moa", 8000): 0.001, ("lora", 8000): 0.02, ("nested", 8000): 0.1}
    tree["methods"]["lora"]["learning_rates"] = [0.02, 0.02]
    with pytest.raises(
        ValueError, match=r"methods.lora: learning_rates=\[0.02, 0.02\] must list one or more different"
    ):
        Study(**tree)


def test_time_left_is_the_mean_of_cells_alike():
    cells = [Cell(TEST, method, 1, seed, 0.1) for method in ("a", "b") for seed in range(3)]
    known = {
        cells[0]: {"seconds": {"train": 1.0, "evaluate": 1.0}},
        cells[3]: {"seconds": {"train": 9.0, "evaluate": 1.0}},
    }
    assert seconds_for(cells[1:3] + cells[4:], known, 1) == pytest.approx(2 * 2 + 2 * 10)
    assert seconds_for(cells[1:3], known, 2) == pytest.approx(2)
    assert seconds_for(cells, {}, 1) is None
    assert seconds_for([], {}, 1) == 0


# Stages, running text, and what is not trained


@pytest.fixture
def staged(tree, tmp_path) -> dict[str, Any]:
    """Sums are learned first, then words; asked are both, and the loss on running text."""
    words = [{"instruction": f"Say {n}", "output": "word " * (n % 3 + 1), "answer": "word"} for n in range(30)]
    for name, rows in (("words", words[:20]), ("words_asked", words[20:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "plain.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    data = tree["data"] | {
        "then": [[str(tmp_path / "words.jsonl")]],
        "test": [*tree["data"]["test"], str(tmp_path / "words_asked.jsonl"), f"text:{tmp_path}/plain.txt@32"],
        "test_rows": 6,
    }
    methods = {"soft-moa": None, "base": {"preset": "none"}}
    claims = [{"better": "soft-moa", "than": ["base"], "metric": "text_loss"}]
    metrics = ["answer_loss", "text_loss"]
    return tree | {"data": data, "methods": methods, "claims": claims, "metrics": metrics}


def test_a_later_stage_goes_on_from_what_the_first_left(staged, tmp_path):
    planned = plan(Study(**staged))
    cell = Cell(TEST, "soft-moa", 8000, 0, 0.01)
    assert [len(rows) for rows in planned.rows.stages] == [34, 18]
    assert len(planned.rows.validation) == 8
    both = run(job(planned, cell))
    first = plan(Study(**staged | {"data": staged["data"] | {"then": []}}))
    # Other validation rows would be another first stage.
    alone = replace(job(planned, cell), recipes=job(planned, cell).recipes[:1])
    assert first.configuration(cell) != planned.configuration(cell)
    once = run(alone)
    assert both["stages"] == [{"sets": once["sets"]}]
    assert both["sets"] != once["sets"]
    assert [state["step"] for state in both["routing"]] == [2, 3, 5, 6]
    assert both["routing"][:2] == once["routing"]
    afresh = run(replace(alone, recipes=job(planned, cell).recipes[1:]))
    assert afresh["sets"] != both["sets"]


def test_running_text_has_a_loss_for_every_window(staged, tmp_path):
    planned = plan(Study(**staged))
    result = run(job(planned, Cell(TEST, "base", 8000, 0, 0.0)))
    text = result["sets"]["plain-32"]
    model, tokenizer = load_base(staged["base"], "float32")
    losses = text_losses(model, tokenizer, planned.rows.texts[0])
    assert text["text_loss"] == pytest.approx(losses, abs=1e-5)
    assert (len(losses), text["family"], "answer_loss" in text) == (6, "text", False)
    ids = torch.tensor([tokenizer(planned.rows.texts[0].text)["input_ids"][32:64]])
    with torch.no_grad():
        chances = model(ids).logits[0].log_softmax(-1)
    assert losses[1] == pytest.approx(-chances[range(15, 31), ids[0, 16:]].mean().item(), rel=1e-5)


def test_a_base_without_training_stands_beside_the_methods(staged, tmp_path):
    planned = plan(Study(**staged))
    assert not any(cell.method == "base" for cell in grid.tries(planned.study, planned.methods))
    assert planned.fits["base", 8000].trained == 0
    failures = conduct(planned, engine=Engine(), progress=lambda state: None)
    assert failures == []
    results = gather(planned)
    assert results["missing_cells"] == 0
    moa, base = results["rows"]
    assert (moa["learning_rate"], base["learning_rate"]) == (moa["learning_rate"], 0.0)
    assert moa["stages"][0]["asked"]["answer_loss"] != moa["sets"]["asked"]["answer_loss"]
    assert base["stages"] == []
    assert 0 <= moa["routing"]["entropy"] <= 1
    page = write_report(results, tmp_path / "index.html").read_text()
    assert "loss on running text, nats" in page
    assert "soft-moa at 8,000 parameters, after stage 1" in page
    assert results["claims"][0]["comparisons"][0]["seeds"] == 2


def test_choices_are_scored_where_answers_are_one_of_a_few(tree, tmp_path):
    rows = [{"instruction": f"Is {n} odd? true/false", "output": str(n % 2 == 1).lower()} for n in range(6)]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = tree["data"] | {"test": [*tree["data"]["test"], str(tmp_path / "odd.jsonl")]}
    study = Study(**tree | {"data": data, "metrics": ["choice"], "methods": {"base": {"preset": "none"}}, "claims": []})
    planned = plan(study)
    sets = run(job(planned, Cell(TEST, "base", 8000, 0, 0.0)))["sets"]
    assert "choice" not in sets["asked"]
    assert set(sets["odd"]["choice"]) <= {0, 1}
    model, tokenizer = load_base(tree["base"], "float32")
    right = chosen(model, tokenizer, planned.rows.sets[1].rows, template="short", kind="bool")
    assert sets["odd"]["choice"] == [int(one) for one in right]
    assert [has(sets[name], "choice") for name in ("asked", "odd")] == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["choice"]}, r"metrics names \['choice'\], but no set"),
        ({"metrics": ["text_loss"]}, r"metrics names \['text_loss'\], but no set"),
        ({"data": {"test": ["text:nowhere@32"]}}, "there is no text 'nowhere'"),
        ({"data": {"test": ["text:manual"]}}, "must name a task or text and at least 2 tokens"),
        ({"data": {"test": ["long:liens@128"]}}, "did you mean 'lines'"),
        ({"data": {"train": ["text:manual@64"]}}, "can be measured on .data.test. but not learned"),
    ],
)
def test_wrong_texts_are_refused_before_the_first_cell(tree, change, message):
    tree |= change if "metrics" in change else {"data": tree["data"] | change["data"]}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        plan(Study(**tree))


def test_cells_of_other_versions_are_not_mixed_in_silently(planned):
    cells = [Cell(TEST, "lora", 8000, seed, 0.01) for seed in (0, 1)]
    now = versions(*PACKAGES)
    check_versions({cells[0]: {"versions": now}, cells[1]: {}})
    with pytest.raises(
        ValueError, match=r"1 of 2 finished cells .* torch 1\.0 \(now .*--any-version.*test-lora-8000-s1"
    ):
        check_versions({cells[0]: {"versions": now}, cells[1]: {"versions": now | {"torch": "1.0"}}})
    for cell in grid.tries(planned.study, planned.methods):
        keep(planned, cell, {"validation_loss": 1.0, "seconds": {}, "versions": now | {"peft": "0.1"}})
    with pytest.raises(ValueError, match=r"peft 0\.1 \(now"):
        conduct(planned, engine=Engine(), progress=lambda state: None)


# Results and page


def routing_states() -> list[dict[str, Any]]:
    """Two blocks with different experts; one of them dies between the two states."""
    one = {"block": 0, "gate": {"q": 0.5, "prompt": 0.25}, "active": {"q": 1.0, "prompt": 0.75}, "dead": []}
    other = {"block": 1, "gate": {"q": 0.5}, "active": {"q": 1.0}, "dead": []}
    dying = other | {"gate": {"q": 0.001}, "active": {"q": 0.0}, "dead": ["q"]}
    return [{"step": 2, "blocks": [one, other]}, {"step": 3, "blocks": [one, dying]}]


def fabricate(planned: Plan, advantage: float) -> None:
    """Cells on disk in which soft-moa is right more often by ``advantage`` than the others."""
    random = np.random.default_rng(0)
    rates = {key: 0.01 for key in planned.fits}
    for cell in grid.tries(planned.study, planned.methods):
        loss = abs(cell.learning_rate - 0.01)
        keep(planned, cell, {"validation_loss": loss})
    for cell in grid.tests(planned.study, planned.methods, rates):
        share = 0.5 + advantage * (cell.method == "soft-moa")
        right = (random.random(12) < share).astype(int).tolist()
        one = {"family": "math", "kind": "number", "chance": 0.1, "rows": 12, "accuracy": right}
        result = {
            "diverged": None,
            "step_seconds": 0.1,
            "peak_memory_mib": 100.0,
            "sets": {"asked": one | {"answer_loss": [1.0 + n / 100 for n in range(12)]}},
            "routing": routing_states(),
            "versions": {"moa": "0"},
        }
        keep(planned, cell, result)


@pytest.mark.parametrize(
    ("advantage", "outcome", "words"), [(0.5, "holds", "Yes."), (-0.5, "fails", "No."), (0, "open", "Not shown.")]
)
def test_the_page_states_the_verdict_whichever_way_it_falls(tree, tmp_path, advantage, outcome, words):
    planned = plan(Study(**tree | {"seeds": list(range(8))}))
    fabricate(planned, advantage)
    results = gather(planned)
    (claim,) = results["claims"]
    assert (claim["outcome"], results["missing_cells"]) == (outcome, 0)
    page = write_report(results, tmp_path / "index.html").read_text()
    assert claim["verdict"].startswith(words)
    assert claim["verdict"].replace("'", "&#39;") in page
    low, high = claim["comparisons"][0]["interval"]
    assert f"{low:+.1f} to {high:+.1f}" in page
    assert "Mixtures win &lt;here&gt;." in page
    assert not re.search(r"https?:|//\w|<script|src=|@import|url\(", page)
    assert claim["verdict"] in markdown(results)
    routing = results["rows"][0]["routing"]
    assert [state["dead"] for state in routing["course"]] == [0, 1]
    assert routing["active"] == pytest.approx((1.0 + 0.75 + 0.0) / 3)
    assert (routing["names"], routing["experts"], routing["blocks"][1]["dead"]) == (["q", "prompt"], 3, ["q"])
    write_results(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["claims"][0]["outcome"] == outcome


@pytest.mark.parametrize("name", ["smollm2"])
def test_committed_results_still_make_a_page(name, tmp_path):
    results = json.loads((BENCHMARKS.parent / "results" / "studies" / f"{name}.json").read_text())
    page = write_report(results, tmp_path / "index.html").read_text()
    for claim in results["claims"]:
        assert claim["verdict"].replace("'", "&#39;") in page
    assert markdown(results).count("\n| ") == len(results["rows"]) + 1


@pytest.mark.parametrize("sound", [[1], []])
def test_a_run_that_diverged_has_no_windows(staged, sound):
    planned = plan(Study(**staged | {"tuning": {"learning_rates": [0.01]}}))
    text = {"family": "text", "kind": "text", "chance": None}
    asked = {"family": "other", "kind": "number", "chance": None, "rows": 2}
    common = {"step_seconds": None, "peak_memory_mib": 1.0, "versions": {}, "routing": []}
    for method, budget in planned.fits:
        for seed in (0, 1):
            lost = seed not in sound and method == "soft-moa"
            measured = {} if lost else {"text_loss": [1.0, 2.0 + seed], "rows": 2}
            sets = {"plain-32": {"rows": 6} | text | measured, "asked": asked | {"answer_loss": [1.0, 1.5]}}
            rate = 0.01 if method == "soft-moa" else 0.0
            keep(planned, Cell(TEST, method, budget, seed, rate), common | {"diverged": lost or None, "sets": sets})
    results = gather(planned)
    told = results["rows"][0]["metrics"]["text_loss"]
    assert told["mean"] == pytest.approx(2.0) if sound else told is None
    assert results["claims"][0]["comparisons"][0]["seeds"] == len(sound)


def test_a_flag_into_a_method_keeps_its_name(tree, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(tree))
    made = Study.load(file, {"methods.soft-moa.note": "mine", "batch-size": "3", "data.test-rows": "5"})
    assert sorted(made.methods) == sorted(tree["methods"])
    assert made.methods["soft-moa"].note == "mine"
    assert (made.batch_size, made.data.test_rows) == (3, 5)


def test_a_text_without_a_window_stops_a_study_before_it_starts(tree, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    data = tree["data"] | {"test": [*tree["data"]["test"], f"text:{tmp_path}/short.txt@64"]}
    with pytest.raises(ValueError, match=r"data\.test: short-64: \d+ tokens of text make no window of 64"):
        plan(Study(**tree | {"data": data}))
    data["test"] = [f"text:{tmp_path}/short.txt@²"]
    with pytest.raises(ValueError, match="at least 2 tokens"):
        plan(Study(**tree | {"data": data}))


def test_a_claim_may_name_the_metric_that_decides_it(tree):
    tree["claims"].append(tree["claims"][0] | {"metric": "answer_loss"})
    planned = plan(Study(**tree | {"seeds": list(range(8))}))
    fabricate(planned, 0.5)
    by_accuracy, by_loss = gather(planned)["claims"]
    assert (by_accuracy["outcome"], by_accuracy["unit"]) == ("holds", "points")
    assert (by_loss["outcome"], by_loss["unit"]) == ("open", "nats")  # the fabricated losses are all alike


def test_an_unfinished_study_says_so(planned, tmp_path):
    fabricate(planned, 0)
    planned.path(Cell(TEST, "lora", 8000, 1, 0.01)).unlink()
    results = gather(planned)
    assert results["missing_cells"] == 1
    assert results["claims"][0]["missing"] == [{"budget": 8000, "rival": "lora"}]
    assert [row["method"] for row in results["rows"]] == ["soft-moa", "nested"]
    assert "1 training runs are still missing" in write_report(results, tmp_path / "index.html").read_text()


# The command


def test_help_suffices_and_mistakes_are_named(tree, tmp_path):
    runner = CliRunner()
    shown = runner.invoke(app, ["bench", "--help"], env={"COLUMNS": "200"}).output
    for word in ("--dry-run", "--only", "--workers", "data.test_rows", "tuning.learning_rates", "budgets"):
        assert word in shown
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(tree))
    wrong = runner.invoke(app, ["bench", str(file), "--only", "sof-moa"])
    assert wrong.exit_code == 2
    assert "did you mean 'soft-moa'" in wrong.output


def wait_for(condition: Any, seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return found


@pytest.mark.slow
def test_a_killed_study_goes_on_and_ends_as_an_unbroken_one(tree, tmp_path):
    tree |= {"methods": {"soft-moa": None, "lora": None}, "claims": [{"better": "soft-moa", "than": ["lora"]}]}
    tree["tuning"] = {"learning_rates": [0.01]}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(tree))
    cells = Path(tree["output"]) / "cells"
    command = [sys.executable, "-m", "moa_command", "bench", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(cells.glob("*.json"))) >= 1)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers), 30)
    before = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    assert 1 <= len(before) < 4
    done = CliRunner().invoke(app, ["bench", str(file)])
    assert done.exit_code == 0, done.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(cells.glob("*.json"))) == 4
    assert (Path(tree["output"]) / "index.html").is_file()
    first = json.loads((Path(tree["output"]) / "results.json").read_text())
    # Without an interruption, with two workers, elsewhere.
    done = CliRunner().invoke(app, ["bench", str(file), "--workers", "2", "--output", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    second = json.loads((tmp_path / "again" / "results.json").read_text())
    assert first["claims"] == second["claims"]
    for ours, theirs in zip(first["rows"], second["rows"], strict=True):
        assert ours["metrics"] == theirs["metrics"]
        assert ours["learning_rate"] == theirs["learning_rate"]
    shutil.rmtree(tmp_path / "again")
