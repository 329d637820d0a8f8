"""Where cells run: a killed process costs its own cell, a lost machine none; results are those of one process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from moa.studies import cells as grid
from moa.studies.conduct import conduct
from moa.studies.engine import Engine
from moa.studies.plan import Plan, plan
from moa.studies.study import Study


@pytest.fixture
def tree(tiny_base: Path, tmp_path: Path) -> dict[str, Any]:
    """Three cells of a few seconds, as plain data."""
    for name, numbers in (("train", range(40)), ("asked", range(40, 52))):
        rows = [{"instruction": f"{n} + 1 = ?", "output": f"It is {n + 1}.", "answer": str(n + 1)} for n in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "output": str(tmp_path / "out"),
        "base": str(tiny_base),
        "budgets": [8000],
        "seeds": [0, 1, 2],
        "steps": 40,
        "batch_size": 4,
        "metrics": ["answer_loss"],
        "data": {
            "train": [str(tmp_path / "train.jsonl")],
            "test": [str(tmp_path / "asked.jsonl")],
            "validation_rows": 8,
            "max_length": 64,
        },
        "tuning": {"learning_rates": [0.01]},
        "training": {"dtype": "float32"},
        "methods": {"lora": None},
    }


def sets_of(planned: Plan) -> dict[str, Any]:
    """What every finished cell measured, by its name."""
    rates = planned.rates(planned.methods)
    assert rates is not None
    done = planned.finished(grid.tests(planned.study, planned.methods, rates))
    return {cell.name: result["sets"] for cell, result in done.items()}


def soon(condition: Callable[[], Any], seconds: float = 600) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def training(planned: Plan, place: int = 0) -> bool:
    """Whether the cell of a seed has begun to train and is not done."""
    log = planned.folder / "logs" / f"test-lora-8000-s{place}.log"
    return log.exists() and "trainable params" in log.read_text()


def process_of(planned: Plan) -> psutil.Process:
    """The process that trains: it has the first cell's log open."""
    log = str(planned.folder / "logs" / "test-lora-8000-s0.log")
    for process in psutil.Process().children(recursive=True):
        if any(file.path == log for file in process.open_files()):
            return process
    raise AssertionError("no process has the log open")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_killed_worker_costs_its_own_cell(tree, tmp_path):
    planned = plan(Study(**tree))

    def kill() -> None:
        soon(lambda: training(planned))
        process_of(planned).kill()

    killer = threading.Thread(target=kill)
    killer.start()
    (failure,) = conduct(planned, engine=Engine(workers=2), progress=lambda state: None)
    killer.join()
    assert "ended with exit code -9" in failure.message
    assert failure.log.name == "test-lora-8000-s0.log"
    kept = sets_of(planned)
    assert sorted(kept) == [f"test-lora-8000-s{seed}" for seed in (1, 2)]
    assert conduct(planned, engine=Engine(), progress=lambda state: None) == []
    unbroken = plan(Study(**tree | {"output": str(tmp_path / "again")}))
    assert conduct(unbroken, engine=Engine(), progress=lambda state: None) == []
    assert sets_of(planned) == sets_of(unbroken)
    assert kept.items() <= sets_of(planned).items()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_lost_machine_costs_its_cells_another_start(tree, tmp_path, monkeypatch):
    """A cluster of two machines on this one, of which the second is taken away while it trains."""
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")  # on a busy machine the usual 15 gets no time at all
    planned = plan(Study(**tree))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    lost: list[str] = []

    def lose() -> None:
        soon(lambda: training(planned, 0) and training(planned, 1))
        lost.extend(log.name for log in (planned.folder / "logs").glob("*.log"))
        cluster.remove_node(second, allow_graceful=False)

    thief = threading.Thread(target=lose)
    thief.start()
    try:
        engine = Engine("ray", address=cluster.address)
        assert conduct(planned, engine=engine, progress=lambda state: None) == []
        thief.join()
        assert len(lost) == 2
        assert sum(node["Alive"] for node in ray.nodes()) == 1
    finally:
        ray.shutdown()
        cluster.shutdown()
    here = plan(Study(**tree | {"output": str(tmp_path / "here")}))
    assert conduct(here, engine=Engine(), progress=lambda state: None) == []
    assert len(sets_of(here)) == 3
    assert sets_of(planned) == sets_of(here)
