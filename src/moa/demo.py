"""The demonstration: a small pretrained chat model learns to turn booking requests into JSON with Soft MoA.

Nothing here is staged: training is `moa.training.sft.train` with the recipe `RECIPE`; before and after are measured by
`moa.evaluation` on the same requests, whose surnames, days and amounts are in no training row; the answers shown are
written by a fresh process that has nothing but the saved folder. Before, the model is told the task in full and shown
solved requests, in its own chat form; after, it is given one short sentence.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from moa.adapters.telemetry import gate_values
from moa.data import load_rows, prompt_of, prompt_tokens
from moa.evaluation.accuracy import Result
from moa.evaluation.answers import fields_right
from moa.evaluation.generation import generate, pad_left
from moa.evaluation.models import load
from moa.evaluation.results import as_json, write
from moa.evaluation.sets import EvaluationSet, evaluate_sets, load_sets
from moa.tasks.bookings import BOOKINGS, EXPLANATION, INSTRUCTION
from moa.training.base import emulates_bfloat16
from moa.training.card import add_accuracy
from moa.training.recipe import Recipe

RECIPE = "smollm2-soft-moa-bookings"
SOURCE = f"tasks:{BOOKINGS.name}"
SOLVED = 2  # requests that the untuned model is shown with their answers
BATCH = 32

Progress = Callable[[int], object]


def recipe_of(output: Path, seed: int, overrides: dict[str, str] | None = None) -> Recipe:
    """The demonstration's recipe, for this folder and seed, in the dtype that this machine is fast in."""
    fast = {"dtype": "float32"} if emulates_bfloat16() else {}
    return Recipe.load(RECIPE, {"output": str(output), "seed": str(seed)} | fast | (overrides or {}))


def test_set(rows: int, seed: int) -> EvaluationSet:
    """So many requests, none of which is in the training data."""
    return load_sets(SOURCE, limit=rows, seed=seed)[0]


def explained(data: EvaluationSet, seed: int) -> EvaluationSet:
    """The same requests, asked in a way that a model without training can answer.

    They become chats: the task in full, `SOLVED` training requests with their answers, then the request.
    """
    solved = [message for row in load_rows(SOURCE, split="train", limit=SOLVED, seed=seed) for message in _turns(row)]
    rows = [{**row, "messages": [*solved, *_turns(row)]} for row in data.rows]
    return dataclasses.replace(data, rows=rows)


def _turns(row: dict[str, Any]) -> list[dict[str, str]]:
    asked = row["instruction"].replace(INSTRUCTION, EXPLANATION, 1)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]


def measure(recipe: Recipe, data: EvaluationSet, *, adapter: Path | None, progress: Progress) -> Result:
    """What the recipe's base model answers, with an adapter or, `explained`, as it is.

    Args:
        recipe: names base model, dtype and prompt template.
        data: what to measure on.
        adapter: folder of the adapter, or None for the base model alone.
        progress: called with the number of rows just finished.
    """
    if adapter is None:
        data = explained(data, recipe.seed)
    loaded = load(
        None if adapter is None else str(adapter), recipe.base, dtype=recipe.dtype, template=recipe.data.template
    )
    [(_, result)] = evaluate_sets(
        loaded.model,
        loaded.tokenizer,
        [data],
        template=loaded.template,
        batch_size=BATCH,
        progress=lambda _, done: progress(done),
    )
    return result


def field_shares(result: Result) -> dict[str, float]:
    """Share of requests, in [0, 1], of which each field is right."""
    right = [fields_right(item.text or "", item.gold) for item in result.items]
    return {name: fmean(row[name] for row in right) for name in right[0]}


def keep(recipe: Recipe, data: EvaluationSet, adapter: Path, *, before: Result, after: Result) -> None:
    """Write every answer of both measurements into the adapter's folder."""
    settings = {
        "base": recipe.base,
        "data": [SOURCE],
        "seed": recipe.seed,
        "template": recipe.data.template,
        "dtype": recipe.dtype,
        "batch_size": BATCH,
        "decoding": "greedy",
    }
    for name, result, used in (("before", before, None), ("after", after, str(adapter))):
        content = as_json([(data, result)], settings | {"adapter": used})
        write(adapter / f"accuracy_{name}.json", content | {"fields": field_shares(result)})
    add_accuracy(adapter, data, {"the base, with the form explained": before, "with this adapter": after})


def mean_gates(adapter: Path, data: EvaluationSet, dtype: str, rows: int = 16) -> tuple[Tensor, list[str]]:
    """How far each expert of each block is open, on average over the tokens of some test prompts.

    Returns:
        Means, (blocks, experts), and the experts' names.
    """
    loaded = load(str(adapter), dtype=dtype)
    ids = [prompt_tokens(loaded.tokenizer, prompt_of(row, loaded.template)) for row in data.rows[:rows]]
    tokens, mask = pad_left(ids, loaded.tokenizer.pad_token_id)
    device = loaded.model.device
    with torch.inference_mode(), gate_values(loaded.model) as record:
        loaded.model(input_ids=tokens.to(device), attention_mask=mask.to(device))
    seen = mask.bool()
    gates = [record.gates[block].float().cpu()[seen].mean(0) for block in sorted(record.gates)]
    return torch.stack(gates), record.experts


def answers_of_fresh_process(adapter: Path, instructions: Sequence[str], dtype: str) -> list[str]:
    """Answers of a new Python process that is given nothing but the adapter's folder.

    Raises:
        RuntimeError: the process failed; with what it said.
    """
    command = [sys.executable, "-m", "moa.demo", str(adapter), dtype]
    done = subprocess.run(command, input=json.dumps(instructions), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the adapter in {adapter} could not be used by a fresh process:\n{done.stderr}")
    return json.loads(done.stdout)


def _answer(adapter: str, dtype: str) -> None:
    """What the fresh process does: instructions as JSON on standard input, answers as JSON on standard output."""
    loaded = load(adapter, dtype=dtype)
    instructions = json.load(sys.stdin)
    prompts = [prompt_of({"instruction": instruction}, loaded.template) for instruction in instructions]
    answers: list[str | None] = [None] * len(prompts)
    tokens = BOOKINGS.answer_tokens
    for places, texts in generate(loaded.model, loaded.tokenizer, prompts, max_new_tokens=tokens, batch_size=BATCH):
        for place, text in zip(places, texts, strict=True):
            answers[place] = text
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    _answer(*sys.argv[1:])
