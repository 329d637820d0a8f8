"""An adapter learns under a span plan, keeps it, and is used with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moa import SpanPlan
from moa.evaluation import models
from moa.training.recipe import Recipe
from moa.training.sft import train


def recipe(folder: Path, **fields: object) -> Recipe:
    return Recipe(
        adapter={"preset": "soft-moa", "r": 2},
        data={"train": ["tasks:reverse"], "limit": 16, "template": "short"},
        output=str(folder),
        max_steps=3,
        log_steps=1,
        batch_size=4,
        **fields,
    )


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    config = models.load().model.config
    narrow = SpanPlan.uniform(config.num_hidden_layers, config.num_key_value_heads, beta=0.0, sink=4, block=4)
    narrow.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def losses(run: Path) -> list[float]:
    entries = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    found = [entry["loss"] for entry in entries if "loss" in entry]
    assert len(found) == 3
    return found


def loss_of(loaded: models.Loaded) -> float:
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        return float(loaded.model(input_ids=ids, labels=ids).loss)


def test_the_plan_changes_training_and_travels_with_the_adapter(tmp_path: Path, plan: Path) -> None:
    dense, planned = train(recipe(tmp_path / "dense")), train(recipe(tmp_path / "planned", spans=str(plan)))
    assert losses(dense) != losses(planned)
    assert not (dense / "spans.json").exists()
    assert SpanPlan.load(planned / "spans.json") == SpanPlan.load(plan)
    own, without = models.load(str(planned)), models.load(str(planned), spans="none")
    named = models.load(str(planned), spans=str(plan))
    assert loss_of(own) == pytest.approx(loss_of(named))
    assert loss_of(own) != pytest.approx(loss_of(without), rel=1e-4)


def test_a_missing_plan_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no-plan\.json"):
        train(recipe(tmp_path / "run", spans=str(tmp_path / "no-plan.json")))
    assert not (tmp_path / "run").exists()


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    SpanPlan.uniform(17, 3).save(tmp_path / "other.json")
    with pytest.raises(ValueError, match="17"):
        train(recipe(tmp_path / "run", spans=str(tmp_path / "other.json")))
