"""Sets that are evaluated in processes of their own come out as in one process, and a set that fails is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moa.evaluation.models import load
from moa.evaluation.sets import evaluate_sets, load_all
from moa.studies.divided import evaluate_on
from moa.studies.engine import Engine


@pytest.fixture
def sets(tmp_path: Path):
    for name, word in (("first", "Yes"), ("second", "No")):
        rows = [{"instruction": f"{word} or not, {n}?", "output": word, "answer": word} for n in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_all([str(tmp_path / "first.jsonl"), str(tmp_path / "second.jsonl")], max_new_tokens=6)


@pytest.mark.slow
def test_two_processes_find_what_one_does(sets, tiny_base, tmp_path):
    model = {"base": str(tiny_base), "dtype": "float32", "template": "short"}
    loaded = load(**model)
    expected = evaluate_sets(
        loaded.model, loaded.tokenizer, sets, template="short", batch_size=4, progress=lambda name, rows: None
    )
    done: list[int] = []
    found, about = evaluate_on(
        Engine(workers=2), sets, model, batch_size=4, logs=tmp_path / "logs", told=lambda: done.append(1)
    )
    assert found == expected
    assert about == {"base": str(tiny_base), "template": "short", "dtype": "float32"}
    assert done
    assert sorted(log.name for log in (tmp_path / "logs").iterdir()) == ["first.log", "second.log"]


@pytest.mark.slow
def test_a_set_that_fails_is_named_with_its_log(sets, tmp_path):
    model = {"base": str(tmp_path / "nothing"), "dtype": "float32", "template": "short"}
    with pytest.raises(RuntimeError, match=r"first: .*nothing.* \(.*first.log\)"):
        evaluate_on(Engine(), sets[:1], model, batch_size=4, logs=tmp_path / "logs", told=lambda: None)
