"""Which estimator should train Sparse MoA's threshold? The embedded base, all bundled tasks, several seeds.

    python benchmarks/threshold_estimators.py --work runs/thresholds --seeds 0 1 2

Every cell (estimator x seed) is one training run with the recipe `embedded-sparse-moa` and is written to a file of its
own, so that a stopped study continues. Seeds change initial weights and data order; test rows are the same for all.
Reported per estimator: accuracy, loss on the answers of the test rows, the share of (token, expert) pairs that are
active on test prompts, experts active on less than one token in a hundred, and the thresholds' spread.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

import moa
from moa.adapters.gating import ESTIMATORS
from moa.data import prompt_of
from moa.evaluation.loss import answer_loss
from moa.evaluation.models import load
from moa.evaluation.results import write
from moa.evaluation.sets import evaluate_sets, load_sets
from moa.training.recipe import Recipe
from moa.training.sft import train

RECIPE = "embedded-sparse-moa"


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    for seed, estimator in product(args.seeds, args.estimators):
        path = args.work / f"{estimator}-{seed}.json"
        if not path.exists():
            print(f"== {estimator}, seed {seed}", flush=True)
            write(path, measure(estimator, seed, args))
    cells = [json.loads((args.work / f"{e}-{s}.json").read_text()) for e, s in product(args.estimators, args.seeds)]
    summary = {name: summarise([cell for cell in cells if cell["estimator"] == name]) for name in args.estimators}
    write(args.out, {"recipe": RECIPE, "steps": args.steps, "items": args.items, "summary": summary, "cells": cells})
    print(table(summary))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="cells and training runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/threshold_estimators.json"))
    parser.add_argument("--estimators", nargs="+", default=list(ESTIMATORS), choices=list(ESTIMATORS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--items", type=int, default=50, help="test rows per task")
    return parser.parse_args()


def measure(estimator: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one cell and look at what came out."""
    run = args.work / f"{estimator}-{seed}"
    flags = {"output": str(run), "seed": str(seed), "max_steps": str(args.steps)}
    recipe = Recipe.load(RECIPE, flags | {"adapter.gating.train_threshold": estimator})
    train(recipe, overwrite=run.exists())
    model, tokenizer = (loaded := load(str(run))).model, loaded.tokenizer
    sets = load_sets("tasks:all", limit=args.items)
    template = recipe.data.template
    outcomes = evaluate_sets(model, tokenizer, sets, template=template, batch_size=32, progress=lambda name, rows: None)
    losses = [answer_loss(model, tokenizer, data.rows, template=template) for data in sets]
    return {
        "estimator": estimator,
        "seed": seed,
        "accuracy": {data.name: result.accuracy for data, result in outcomes},
        "answer_loss": fmean(losses),
        **routing(model, tokenizer, [prompt_of(row, template) for data in sets for row in data.rows[:10]]),
    }


def routing(model: Any, tokenizer: Any, prompts: list[str]) -> dict[str, Any]:
    """Shares of active experts, (block x expert), and the spread of the thresholds over tokens."""
    active, thresholds = [], []
    for prompt in prompts:
        with moa.gate_values(model) as record, torch.no_grad():
            model(**tokenizer(prompt, return_tensors="pt"))
        blocks = sorted(record.gates)
        active.append(torch.stack([(record.gates[b][0] != 0).float().mean(0) for b in blocks]))
        thresholds += [record.thresholds[b].flatten() for b in blocks]
    share = torch.stack(active).mean(0)
    gamma = torch.cat(thresholds)
    return {
        "active_share": share.mean().item(),
        "active_by_expert": dict(zip(record.experts, share.mean(0).tolist(), strict=True)),
        "dead_experts": int((share < 0.01).sum()),
        "threshold_mean": gamma.mean().item(),
        "threshold_sd": gamma.std().item(),
    }


def summarise(cells: list[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds, and the standard deviation of what decides."""
    accuracy = [fmean(cell["accuracy"].values()) for cell in cells]
    loss = [cell["answer_loss"] for cell in cells]
    rest = ("active_share", "dead_experts", "threshold_mean", "threshold_sd")
    return {
        "accuracy": fmean(accuracy),
        "accuracy_sd": stdev(accuracy) if len(cells) > 1 else float("nan"),
        "answer_loss": fmean(loss),
        "answer_loss_sd": stdev(loss) if len(cells) > 1 else float("nan"),
    } | {name: fmean(cell[name] for cell in cells) for name in rest}


def table(summary: dict[str, dict[str, float]]) -> str:
    lines = [
        "| estimator | accuracy % | answer loss | active | dead experts | Gamma mean, sd |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in summary.items():
        lines.append(
            f"| {name} | {100 * row['accuracy']:.1f} ± {100 * row['accuracy_sd']:.1f} "
            f"| {row['answer_loss']:.4f} ± {row['answer_loss_sd']:.4f} | {row['active_share']:.2f} "
            f"| {row['dead_experts']:.1f} | {row['threshold_mean']:.3f}, {row['threshold_sd']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
