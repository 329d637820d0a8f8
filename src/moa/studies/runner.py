"""One cell: train by recipe, load what was saved, measure. Runs in a process of its own (`moa.studies.workers`)."""

from __future__ import annotations

import platform
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file

from moa.data import prompt_of
from moa.evaluation.accuracy import evaluate
from moa.evaluation.loss import answer_loss, answer_losses
from moa.evaluation.results import PACKAGES
from moa.evaluation.sets import EvaluationSet
from moa.studies.meters import peak_memory, step_times
from moa.studies.routing import routing, snapshot_weights
from moa.training.base import load_base
from moa.training.checkpoints import WEIGHTS, checkpoints
from moa.training.recipe import Recipe
from moa.training.sft import train
from moa.training.stops import Diverged
from moa.versions import versions

PROMPTS = 4  # of each test set, on which the routers are watched


@dataclass(frozen=True)
class Job:
    """What one worker does.

    Attributes:
        recipe: the training run.
        validation: rows to measure the answer loss on; the only measure of a try.
        sets: test sets; empty for a try.
        metrics: what is measured on them.
    """

    recipe: Recipe
    validation: Sequence[dict[str, Any]]
    sets: Sequence[EvaluationSet]
    metrics: Sequence[str]


def run(job: Job) -> dict[str, Any]:
    """Train and measure; the run's folder is deleted afterwards.

    Returns:
        What a cell's file holds besides its configuration, see ``docs/howto/bench.md``. A run that diverged has all
        its answers counted as wrong and no losses.
    """
    folder = Path(job.recipe.output)
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    diverged = None
    with step_times() as steps:
        try:
            train(job.recipe)
        except Diverged as stop:
            diverged = str(stop)
    trained_by = time.perf_counter()
    result: dict[str, Any] = {
        "diverged": diverged,
        "step_seconds": statistics.median(steps) if steps else None,
        "peak_memory_mib": peak_memory(),
    }
    result |= _measure(job, folder) if diverged is None else _failed(job)
    result["seconds"] = {"train": trained_by - started, "evaluate": time.perf_counter() - trained_by}
    result["cpu_seconds"] = time.process_time()  # unlike the others, not longer on a busy machine
    result["versions"] = versions(*PACKAGES) | {"python": platform.python_version()}
    shutil.rmtree(folder, ignore_errors=True)
    return result


def _measure(job: Job, folder: Path) -> dict[str, Any]:
    base, tokenizer = load_base(job.recipe.base, job.recipe.dtype, device_map=_device())
    model: Any = PeftModel.from_pretrained(base, str(folder)).eval()
    template, batch = job.recipe.data.template, job.recipe.batch_size
    if not job.sets:
        return {"validation_loss": answer_loss(model, tokenizer, job.validation, template=template, batch_size=batch)}
    return {
        "sets": {data.name: _measure_set(job, model, tokenizer, data) for data in job.sets},
        "routing": _routing(job, model, tokenizer, folder),
    }


def _measure_set(job: Job, model: Any, tokenizer: Any, data: EvaluationSet) -> dict[str, Any]:
    template = job.recipe.data.template
    found: dict[str, Any] = {"family": data.family, "kind": data.kind, "chance": data.chance, "rows": len(data.rows)}
    if "accuracy" in job.metrics:
        outcome = evaluate(
            model,
            tokenizer,
            data.rows,
            template=template,
            kind=data.kind,
            max_new_tokens=data.max_new_tokens,
            batch_size=2 * job.recipe.batch_size,  # reading takes less memory than training
        )
        found["accuracy"] = [int(item.correct) for item in outcome.items]
    if "answer_loss" in job.metrics:  # row by row: statistics are paired by item
        losses = answer_losses(model, tokenizer, data.rows, template=template, batch_size=job.recipe.batch_size)
        found["answer_loss"] = [round(loss / tokens, 6) for loss, tokens in losses]
    return found


def _failed(job: Job) -> dict[str, Any]:
    if not job.sets:
        return {"validation_loss": None}
    sets: dict[str, dict[str, Any]] = {}
    for data in job.sets:
        sets[data.name] = {"family": data.family, "kind": data.kind, "chance": data.chance, "rows": len(data.rows)}
        if "accuracy" in job.metrics:
            sets[data.name]["accuracy"] = [0] * len(data.rows)
    return {"sets": sets, "routing": []}


def _routing(job: Job, model: Any, tokenizer: Any, folder: Path) -> list[dict[str, Any]]:
    """The routers' state at the checkpoints of the run, the end of training last."""
    prompts = [prompt_of(row, job.recipe.data.template) for data in job.sets for row in data.rows[:PROMPTS]]
    states = {int(path.name.rpartition("-")[2]): path for path in checkpoints(folder)}
    found = []
    for step, path in states.items():
        snapshot_weights(model, load_file(path / WEIGHTS, device=str(model.device)))
        if blocks := routing(model, tokenizer, prompts):
            found.append({"step": step, "blocks": blocks})
    return found


def trial(job: Job, steps: int = 4, rows: int = 8) -> Job:
    """The job cut short, to see how long it takes."""
    recipe = replace(job.recipe, max_steps=steps, save_steps=steps, output=f"{job.recipe.output}-trial")
    return replace(job, recipe=recipe, sets=[replace(data, rows=data.rows[:rows]) for data in job.sets])


def _device() -> str | None:
    return "auto" if torch.accelerator.is_available() else None
