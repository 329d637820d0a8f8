"""The demonstration: a small language model learns a suite of small tasks with Soft MoA, measured before and after.

Nothing here is staged: training is `moa.training.sft.train` with the recipe ``embedded-soft-moa``, accuracies come
from `moa.evaluation` on questions that are in no training row, and the examples are written by a fresh process that
has nothing but the saved folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moa.adapters.telemetry import gate_values
from moa.data import prompt_of, prompt_tokens
from moa.evaluation.generation import generate, pad_left
from moa.evaluation.models import load
from moa.evaluation.results import Outcome, as_json, write
from moa.evaluation.sets import EvaluationSet, evaluate_sets, load_sets
from moa.training.recipe import Recipe

RECIPE = "embedded-soft-moa"
BATCH = 100
SHOWN = ("two_step", "sorting", "fact_choice", "coreference")  # tasks whose answers are nice to read

Progress = Callable[[str, int], object]


def recipe_of(output: Path, seed: int, overrides: dict[str, str] | None = None) -> Recipe:
    """The demonstration's recipe, for this folder and seed."""
    return Recipe.load(RECIPE, {"output": str(output), "seed": str(seed)} | (overrides or {}))


def test_sets(rows: int, seed: int) -> list[EvaluationSet]:
    """All bundled tasks, with so many test rows each."""
    return load_sets("tasks:all", limit=rows, seed=seed)


def measure(
    recipe: Recipe, sets: Sequence[EvaluationSet], *, adapter: Path | None, progress: Progress
) -> list[Outcome]:
    """Accuracy of the recipe's base model, with an adapter or as it is.

    Args:
        recipe: names base model and prompt template.
        sets: what to measure on.
        adapter: folder of the adapter, or None for the base model alone.
        progress: called with a set's name and the rows just finished.
    """
    template = recipe.data.template
    loaded = load(None if adapter is None else str(adapter), recipe.base, template=template)
    return evaluate_sets(loaded.model, loaded.tokenizer, sets, template=template, batch_size=BATCH, progress=progress)


def keep(recipe: Recipe, adapter: Path, *, before: Sequence[Outcome], after: Sequence[Outcome]) -> None:
    """Write every answer of both measurements into the adapter's folder."""
    settings = {
        "base": recipe.base,
        "data": ["tasks:all"],
        "seed": recipe.seed,
        "template": recipe.data.template,
        "batch_size": BATCH,
        "decoding": "greedy",
    }
    write(adapter / "accuracy_before.json", as_json(before, settings | {"adapter": None}))
    write(adapter / "accuracy_after.json", as_json(after, settings | {"adapter": str(adapter)}))


def mean_gates(adapter: Path, sets: Sequence[EvaluationSet], rows: int = 8) -> tuple[Tensor, list[str]]:
    """How far each expert of each block is open, on average over the tokens of some test prompts.

    Returns:
        Means, (blocks, experts), and the experts' names.
    """
    loaded = load(str(adapter))
    prompts = [prompt_of(row, loaded.template) for data in sets for row in data.rows[:rows]]
    ids = [prompt_tokens(loaded.tokenizer, prompt) for prompt in prompts]
    tokens, mask = pad_left(ids, loaded.tokenizer.pad_token_id)
    device = loaded.model.device
    with torch.inference_mode(), gate_values(loaded.model) as record:
        loaded.model(input_ids=tokens.to(device), attention_mask=mask.to(device))
    seen = mask.bool()
    return torch.stack([record.gates[block].cpu()[seen].mean(0) for block in sorted(record.gates)]), record.experts


def shown_rows(sets: Sequence[EvaluationSet]) -> list[dict[str, str]]:
    """A few test rows to show."""
    return [data.rows[0] for data in sets if data.name in SHOWN]


def answers_of_fresh_process(adapter: Path, instructions: Sequence[str]) -> list[str]:
    """Answers of a new Python process that is given nothing but the adapter's folder.

    Raises:
        RuntimeError: the process failed; with what it said.
    """
    command = [sys.executable, "-m", "moa.demo", str(adapter)]
    done = subprocess.run(command, input=json.dumps(instructions), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the adapter in {adapter} could not be used by a fresh process:\n{done.stderr}")
    return json.loads(done.stdout)


def _answer(adapter: str) -> None:
    """What the fresh process does: instructions as JSON on standard input, answers as JSON on standard output."""
    loaded = load(adapter)
    instructions = json.load(sys.stdin)
    prompts = [prompt_of({"instruction": instruction}, loaded.template) for instruction in instructions]
    answers: list[str | None] = [None] * len(prompts)
    for places, texts in generate(loaded.model, loaded.tokenizer, prompts, max_new_tokens=40, batch_size=8):
        for place, text in zip(places, texts, strict=True):
            answers[place] = text
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    _answer(sys.argv[1])
