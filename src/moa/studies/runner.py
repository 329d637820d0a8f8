"""One cell: train by recipes, load what was saved, measure. Runs in a process of its own (`moa.studies.engine`)."""

from __future__ import annotations

import platform
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file

from moa.data import prompt_of, prompt_tokens
from moa.evaluation.accuracy import evaluate
from moa.evaluation.likelihood import KINDS, chosen
from moa.evaluation.loss import answer_loss, answer_losses
from moa.evaluation.results import PACKAGES
from moa.evaluation.retrieval import TextSet, text_losses
from moa.evaluation.sets import EvaluationSet
from moa.spans import SpanPlan
from moa.studies.meters import peak_memory, step_times
from moa.studies.routing import routing, snapshot_weights
from moa.studies.spans import Spans
from moa.training.base import load_base
from moa.training.checkpoints import WEIGHTS, checkpoints
from moa.training.recipe import Recipe
from moa.training.sft import train
from moa.training.spans import plan_from
from moa.training.stops import Diverged
from moa.versions import versions

Tested = EvaluationSet | TextSet

PROMPTS = 4  # of each test set, on which the routers are watched
BLOCK = 64  # tokens that the length of a test set is rounded up to


@dataclass(frozen=True)
class Job:
    """What one worker does.

    Attributes:
        base: the base model, and its dtype.
        recipes: the training runs, each on top of the one before; empty: the base is measured as it is.
        spans: how the model attends when it is measured.
        template: of the prompts.
        batch_size: rows per batch of the evaluation.
        validation: rows to measure the answer loss on; the only measure of a try.
        sets: test sets; empty for a try, as is ``texts``.
        texts: running text.
        metrics: what is measured on them.
    """

    base: str
    dtype: str
    recipes: Sequence[Recipe]
    spans: Spans
    template: str
    batch_size: int
    validation: Sequence[dict[str, Any]]
    sets: Sequence[EvaluationSet]
    texts: Sequence[TextSet]
    metrics: Sequence[str]

    @property
    def tested(self) -> list[Tested]:
        """What is measured at the end; nothing in a try."""
        return [*self.sets, *self.texts]


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
    base, tokenizer = load_base(job.base, job.dtype, device_map="auto")
    model: Any = base.eval()
    recipe = job.recipes[stage] if job.recipes else None
    if recipe is not None:
        model = PeftModel.from_pretrained(base, recipe.output).eval()
    learned_under = plan_from(recipe.spans) if recipe is not None and not job.spans.name else None
    if not job.tested:
        with job.spans.applied(model, learned_under):
            return {
                "validation_loss": answer_loss(
                    model, tokenizer, job.validation, template=job.template, batch_size=job.batch_size
                )
            }
    plan_at = job.spans.prepared(model, tokenizer)
    found: dict[str, dict[str, Any]] = {}
    for data in job.tested:
        plan = learned_under or plan_at(_length(job, tokenizer, data))
        with job.spans.applied(model, plan):
            found[data.name] = _about(data) | _scores(job, model, tokenizer, data) | _kept(job, tokenizer, data, plan)
    if recipe is None:
        return {"sets": found}
    return {"sets": found, "routing": list(_routing(job, model, tokenizer, stage))}


def _length(job: Job, tokenizer: Any, data: Tested) -> int:
    """Tokens that a text of the set reaches, in whole blocks."""
    if isinstance(data, TextSet):
        return data.length
    prompts = (prompt_tokens(tokenizer, prompt_of(row, job.template)) for row in data.rows)
    return -(-(max(map(len, prompts)) + data.max_new_tokens) // BLOCK) * BLOCK


def _about(data: Tested) -> dict[str, Any]:
    if isinstance(data, TextSet):
        return {"family": "text", "kind": "text", "chance": None, "rows": data.windows}
    return {"family": data.family, "kind": data.kind, "chance": data.chance, "rows": len(data.rows)}


def _kept(job: Job, tokenizer: Any, data: Tested, plan: SpanPlan | None) -> dict[str, Any]:
    """The share of the KV cache that is kept, where it is less than all."""
    if job.spans.pressed:
        return {"kv_share": job.spans.share}
    return {} if plan is None else {"kv_share": plan.kv_density(_length(job, tokenizer, data))}


def _scores(job: Job, model: Any, tokenizer: Any, data: Tested) -> dict[str, Any]:
    """Row by row, or window by window: statistics are paired by item."""
    found: dict[str, Any] = {}
    if isinstance(data, TextSet):
        if "text_loss" in job.metrics and not job.spans.pressed:
            found["text_loss"] = [round(loss, 6) for loss in text_losses(model, tokenizer, data)]
            found["rows"] = len(found["text_loss"])
        return found
    if "accuracy" in job.metrics:
        outcome = evaluate(
            model,
            tokenizer,
            data.rows,
            template=job.template,
            kind=data.kind,
            max_new_tokens=data.max_new_tokens,
            # Reading takes less memory than training. A press would choose among padding, too.
            batch_size=1 if job.spans.pressed else 2 * job.batch_size,
        )
        found["accuracy"] = [int(item.correct) for item in outcome.items]
    if "choice" in job.metrics and data.kind in KINDS and not job.spans.pressed:
        right = chosen(
            model, tokenizer, data.rows, template=job.template, kind=data.kind, batch_size=2 * job.batch_size
        )
        found["choice"] = [int(one) for one in right]
    if "answer_loss" in job.metrics and not job.spans.pressed:
        losses = answer_losses(model, tokenizer, data.rows, template=job.template, batch_size=job.batch_size)
        found["answer_loss"] = [round(loss / tokens, 6) for loss, tokens in losses]
    return found


def _failed(job: Job) -> dict[str, Any]:
    if not job.tested:
        return {"validation_loss": None}
    sets = {data.name: _about(data) for data in job.tested}
    for data in job.sets:
        wrong = {"accuracy"} | ({"choice"} if data.kind in KINDS else set())
        sets[data.name] |= {metric: [0] * len(data.rows) for metric in wrong & set(job.metrics)}
    return {"sets": sets, "routing": []}


def _routing(job: Job, model: Any, tokenizer: Any, stage: int) -> Iterator[dict[str, Any]]:
    """The routers' state at the checkpoints of a stage, its end last."""
    prompts = [prompt_of(row, job.template) for data in job.sets for row in data.rows[:PROMPTS]]
    before = sum(int(recipe.max_steps or 0) for recipe in job.recipes[:stage])
    for path in checkpoints(Path(job.recipes[stage].output)) if prompts else []:
        snapshot_weights(model, load_file(path / WEIGHTS, device=str(model.device)))
        if blocks := routing(model, tokenizer, prompts):
            yield {"step": before + int(path.name.rpartition("-")[2]), "blocks": blocks}


def trial(job: Job, steps: int = 4, rows: int = 8) -> Job:
    """The job cut short, to see how long it takes."""
    recipes = [
        replace(recipe, max_steps=steps, save_steps=steps, output=f"{recipe.output}-trial") for recipe in job.recipes
    ]
    sets = [replace(data, rows=data.rows[:rows]) for data in job.sets]
    return replace(job, recipes=recipes, sets=sets, texts=[replace(text, windows=2) for text in job.texts])
