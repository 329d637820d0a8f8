"""One cell: train by recipes, load what was saved, measure. Runs in a process of its own (`moa.studies.engine`)."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from moa.data import prompt_of, prompt_tokens
from moa.evaluation.accuracy import evaluate
from moa.evaluation.likelihood import chosen
from moa.evaluation.loss import answer_loss, answer_losses
from moa.evaluation.results import PACKAGES, write
from moa.evaluation.retrieval import TextSet, text_losses
from moa.studies.cells import TEST, Cell
from moa.studies.data import Rows, Tested, about, has
from moa.studies.meters import peak_memory, step_times
from moa.studies.metrics import METRICS
from moa.studies.routing import routing
from moa.studies.spans import Spans
from moa.studies.study import Study
from moa.training.base import load_base
from moa.training.checkpoints import WEIGHTS, checkpoints
from moa.training.recipe import Recipe
from moa.training.sft import train
from moa.training.spans import plan_from
from moa.training.stops import Diverged
from moa.versions import versions

PROMPTS = 4  # of each test set, on which the routers are watched
BLOCK = 64  # tokens that the length of a test set is rounded up to


@dataclass(frozen=True)
class Job:
    """What one worker does.

    Attributes:
        study, cell: the measurement that is wanted.
        recipes: the training runs, each on top of the one before; empty: the base is measured as it is.
        rows: to measure on; those to learn are in files that the recipes name.
        folder: of the study.
    """

    study: Study
    cell: Cell
    recipes: Sequence[Recipe]
    rows: Rows
    folder: Path

    @property
    def tested(self) -> list[Tested]:
        """What is measured at the end; nothing in a try, whose only measure is the loss on validation rows."""
        return self.rows.tested if self.cell.purpose == TEST else []

    @property
    def spans(self) -> Spans:
        """How the model attends when it is measured; in a try as it was trained."""
        study, cell = self.study, self.cell
        name = study.methods[cell.method].spans
        made_with = json.dumps([study.base, study.dtype, asdict(study.calibration)])
        digest = hashlib.sha256(made_with.encode()).hexdigest()[:8]  # other settings neither meet nor replace a plan
        folder = self.folder / "spans" / f"seed-{cell.seed}-{digest}"
        return Spans(name if cell.purpose == TEST else "", cell.budget, study.calibration, folder, cell.seed)


def keep(job: Job, about_it: Mapping[str, Any], path: Path) -> None:
    """Run a job and write the cell's file, which appears whole or not at all and holds ``about_it``, too."""
    write(path, {**about_it, **run(job)})


def run(job: Job) -> dict[str, Any]:
    """Train and measure; the runs' folders are deleted afterwards.

    Returns:
        What a cell's file holds besides its configuration, see ``docs/howto/bench.md``. A run that diverged has all
        its answers counted as wrong and no losses.
    """
    folders = [Path(recipe.output) for recipe in job.recipes]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    started = time.process_time()
    result: dict[str, Any] = {"diverged": None, "seconds": {"train": 0.0, "evaluate": 0.0}, "stages": []}
    try:
        with step_times() as steps:
            for stage in range(max(len(job.recipes), 1)):
                _stage(job, stage, result)
    except Diverged as stop:
        result |= {"diverged": str(stop), "stages": [], **_failed(job)}
    result |= {"step_seconds": statistics.median(steps) if steps else None, "peak_memory_mib": peak_memory()}
    result["cpu_seconds"] = time.process_time() - started  # unlike the others, not longer on a busy machine
    result["versions"] = versions(*PACKAGES) | {"python": platform.python_version()}
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return result


def _stage(job: Job, stage: int, result: dict[str, Any]) -> None:
    """Train one stage and measure after it; what the stage before left is kept under ``stages``."""
    began = time.perf_counter()
    if job.recipes:
        train(job.recipes[stage], start=Path(job.recipes[stage - 1].output) if stage else None)
    trained = time.perf_counter()
    if stage and job.tested:
        result["stages"].append({"sets": result["sets"]})
    if job.tested or stage + 1 == len(job.recipes):
        found = _measure(job, stage)
        found["routing"] = [*result.get("routing", []), *found.get("routing", [])]
        result |= found
    result["seconds"]["train"] += trained - began
    result["seconds"]["evaluate"] += time.perf_counter() - trained


def _measure(job: Job, stage: int) -> dict[str, Any]:
    study, spans = job.study, job.spans
    base, tokenizer = load_base(study.base, study.dtype, device_map="auto")
    model: Any = base.eval()
    recipe = job.recipes[stage] if job.recipes else None
    if recipe is not None:
        model = PeftModel.from_pretrained(base, recipe.output).eval()
    learned_under = plan_from(recipe.spans) if recipe is not None and not spans.name else None
    if not job.tested:
        asked, template = job.rows.validation, study.data.template
        with spans.applied(model, learned_under):
            loss = answer_loss(model, tokenizer, asked, template=template, batch_size=study.batch_size)
        return {"validation_loss": loss}
    plan_at = spans.prepared(model, tokenizer)
    found: dict[str, dict[str, Any]] = {}
    for data in job.tested:
        length = _length(data, tokenizer, study.data.template)
        plan = learned_under or plan_at(length)
        with spans.applied(model, plan):
            found[data.name] = about(data) | _scores(job, model, tokenizer, data)
        if spans.pressed or plan is not None:
            found[data.name]["kv_share"] = spans.share if plan is None else plan.kv_share(base, length)
    if recipe is None:
        return {"sets": found}
    return {"sets": found, "routing": list(_routing(job, model, tokenizer, stage))}


def _length(data: Tested, tokenizer: Any, template: str) -> int:
    """Tokens that a text of the set reaches, in whole blocks."""
    if isinstance(data, TextSet):
        return data.length
    prompts = (prompt_tokens(tokenizer, prompt_of(row, template)) for row in data.rows)
    return -(-(max(map(len, prompts)) + data.max_new_tokens) // BLOCK) * BLOCK


def _scores(job: Job, model: Any, tokenizer: Any, data: Any) -> dict[str, Any]:
    """Row by row, or window by window: statistics are paired by item."""
    study, pressed = job.study, job.spans.pressed
    template, batch_size = study.data.template, study.batch_size
    wanted = [metric for metric in study.metrics if has(about(data), metric) and (metric == "accuracy" or not pressed)]
    found: dict[str, Any] = {}
    if "text_loss" in wanted:
        found["text_loss"] = [round(loss, 6) for loss in text_losses(model, tokenizer, data)]
        found["rows"] = len(found["text_loss"])
    if "accuracy" in wanted:
        outcome = evaluate(
            model,
            tokenizer,
            data.rows,
            template=template,
            kind=data.kind,
            max_new_tokens=data.max_new_tokens,
            # Reading takes less memory than training. A press would choose among padding, too.
            batch_size=1 if pressed else 2 * batch_size,
        )
        found["accuracy"] = [int(item.correct) for item in outcome.items]
    if "choice" in wanted:
        right = chosen(model, tokenizer, data.rows, template=template, kind=data.kind, batch_size=2 * batch_size)
        found["choice"] = [int(one) for one in right]
    if "answer_loss" in wanted:
        losses = answer_losses(model, tokenizer, data.rows, template=template, batch_size=batch_size)
        found["answer_loss"] = [round(loss / tokens, 6) for loss, tokens in losses]
    return found


def _failed(job: Job) -> dict[str, Any]:
    if not job.tested:
        return {"validation_loss": None}
    sets = {data.name: about(data) for data in job.tested}
    shares = [metric for metric in job.study.metrics if METRICS[metric].unit == "points"]
    for told in sets.values():
        told |= {metric: [0] * told["rows"] for metric in shares if has(told, metric)}
    return {"sets": sets, "routing": []}


def _routing(job: Job, model: Any, tokenizer: Any, stage: int) -> Iterator[dict[str, Any]]:
    """The routers' state at the checkpoints of a stage, its end last."""
    prompts = [prompt_of(row, job.study.data.template) for data in job.rows.sets for row in data.rows[:PROMPTS]]
    before = sum(int(recipe.max_steps or 0) for recipe in job.recipes[:stage])
    for path in checkpoints(Path(job.recipes[stage].output)) if prompts else []:
        set_peft_model_state_dict(model, load_file(path / WEIGHTS, device=str(model.device)))
        if blocks := routing(model, tokenizer, prompts):
            yield {"step": before + int(path.name.rpartition("-")[2]), "blocks": blocks}


def trial(job: Job, steps: int = 4, rows: int = 8) -> Job:
    """The job cut short, to see how long it takes."""
    recipes = [
        replace(recipe, max_steps=steps, save_steps=steps, output=f"{recipe.output}-trial") for recipe in job.recipes
    ]
    sets = [replace(data, rows=data.rows[:rows]) for data in job.rows.sets]
    texts = [replace(text, windows=2) for text in job.rows.texts]
    return replace(job, recipes=recipes, rows=replace(job.rows, sets=sets, texts=texts))
