"""Does an adapter that is trained under a span plan win back what the plan costs?

    python benchmarks/span_recovery.py --work runs/span-recovery

A plan for few bytes is searched for the embedded long-context model (influence, search and validation as in
`span_quality.py`), beside one window for all heads at equal bytes. Soft MoA learns the long-context tasks, with
seeds other than the test's, either dense or under a plan. Six models are measured through `generate()`: dense and the
plan; both with the adapter that was trained dense, which shows what practice alone gives; and the plan with the
adapter that was trained under it. Where no head reaches an answer, no adapter can fetch it in one step: `reach` is the
share of test prompts whose answer at least one head still holds when the question has been read.

Every adapter and every measured model is a file in `--work`, so that a stopped run continues.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from span_quality import VALIDATION, apply, calibration, influences, load
from torch.nn.functional import cross_entropy

import moa
from moa.assets import base_path
from moa.evaluation.accuracy import wilson
from moa.evaluation.generation import pad_left
from moa.evaluation.results import write
from moa.evaluation.retrieval import answers_right, long_prompts, perplexity
from moa.spans.baselines import uniform_window
from moa.spans.evidence.validation import validate
from moa.spans.search.plans import Limits, search
from moa.tasks.long_context import LONG_TASKS

TRAIN = 11  # seed of the training prompts of the first seed; the others follow it
TEST = 5  # not that of `span_quality.py`, on whose prompts the settings here were chosen
WARM_UP = 20  # steps
Row = tuple[list[int], list[int]]  # tokens of a prompt, tokens of its answer


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    settle(args)
    plans = {"dense": None, **{name: plan_of(name, args) for name in args.plans}}
    cells = [measured(plans, name, "none", 0, args) for name in plans]
    for seed in args.seeds:
        for name in plans:
            cells.append(measured(plans, name, name, seed, args))
            if name != "dense":
                cells.append(measured(plans, name, "dense", seed, args))
        report(plans, cells, args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="influence, plans, adapters and cells")
    parser.add_argument("--plans", nargs="+", default=["searched", "window"], choices=["searched", "window"])
    parser.add_argument("--density", type=float, default=0.3, help="share of the KV bytes")
    parser.add_argument("--length", type=int, default=512, help="tokens, of training and of the test")
    parser.add_argument("--items", type=int, default=8, help="calibration prompts per task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of adapters and their training data")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=4, help="rows per step")
    parser.add_argument("--rate", type=float, default=5e-3, help="highest learning rate")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA expert; the parallel one has twice as many")
    parser.add_argument("--prompts", type=int, default=100, help="test prompts per task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "span_recovery.json")
    return parser.parse_args()


def settle(args: argparse.Namespace) -> None:
    """Refuse a folder of other settings; more seeds and plans may be added."""
    free = {"work", "plans", "seeds", "threads", "out"}
    ours = {name: value for name, value in vars(args).items() if name not in free}
    path = args.work / "settings.json"
    if not path.exists():
        write(path, ours)
    if changed := [name for name, value in json.loads(path.read_text()).items() if ours[name] != value]:
        raise SystemExit(f"{args.work} has results of another {', '.join(changed)}: choose another --work")


def plan_of(name: str, args: argparse.Namespace) -> moa.SpanPlan:
    """The plan of a method, from disk where it is there."""
    path = args.work / f"plan-{name}.json"
    if not path.exists():
        model, tokenizer = load("embedded-long")
        if name == "window":
            plan = uniform_window(model, args.density, args.length)
        else:
            lost = influences(model, tokenizer, args.length, args).mean()
            front = search({args.length: lost}, Limits(density=args.density, step=64), model="embedded-long")
            items = calibration(model, tokenizer, args.length, args.items, VALIDATION)
            plan = validate(model, [candidate.plan for candidate in front], items, args.length).plan
        plan.save(path)
    return moa.SpanPlan.load(path)


def adapted(trained: str, plan: moa.SpanPlan | None, seed: int, args: argparse.Namespace) -> Any:
    """The model with the adapter of a seed that was trained under a plan; "none": without."""
    model, tokenizer = load("embedded-long")
    if trained == "none":
        return model.eval()
    folder = args.work / f"adapter-{trained}-{seed}"
    if not folder.exists():
        torch.manual_seed(seed)
        config = moa.preset("soft-moa", r=args.rank, alpha=args.rank, size=2 * args.rank)
        learner = get_peft_model(load("embedded-long")[0], config).train()
        with apply(learner, plan):
            learn(learner, batches(tokenizer, seed, args), args, f"{trained} {seed}")
        draft = folder.with_name(f".{folder.name}.part")
        learner.save_pretrained(draft)
        draft.replace(folder)
    return PeftModel.from_pretrained(model, folder).eval()


def batches(tokenizer: Any, seed: int, args: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows of all tasks in random order, none twice."""
    each = -(-args.steps * args.batch_size // len(LONG_TASKS))
    rows = [
        (tokenizer(prompt.prompt)["input_ids"], tokenizer(prompt.answer)["input_ids"])
        for task in LONG_TASKS
        for prompt in long_prompts(tokenizer, task, args.length, each, TRAIN + seed)
    ]
    random.Random(seed).shuffle(rows)
    for step in range(args.steps):
        yield rows[step * args.batch_size : (step + 1) * args.batch_size]


def learn(model: Any, data: Iterator[list[Row]], args: argparse.Namespace, name: str) -> None:
    """Teach the answers; a short answer weighs as much as a long one."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step, rows in enumerate(data, start=1):
        ids, mask = pad_left([asked + said for asked, said in rows], 0)
        labels, counts = pad_left([said for _, said in rows], 0)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=labels.shape[1] + 1).logits
        losses = cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
        loss = ((losses * counts).sum(1) / counts.sum(1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.param_groups[0]["lr"] = args.rate * min(step / WARM_UP, 1) * (1 - step / args.steps)
        optimiser.step()
        optimiser.zero_grad()
        if step % 25 == 0:
            print(f"adapter {name}: step {step} of {args.steps}, loss {loss.item():.3f}", flush=True)


def measured(
    plans: dict[str, moa.SpanPlan | None], name: str, trained: str, seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """What a plan answers, with the adapter that was trained under a plan; from disk where it is there."""
    path = args.work / f"cell-{name}-{trained}-{seed}.json"
    if not path.exists():
        model, tokenizer = adapted(trained, plans.get(trained), seed, args), load("embedded-long")[1]
        cell: dict[str, Any] = {"plan": name, "trained": trained, "seed": seed, "right": {}}
        with apply(model, plans[name]):
            for task in LONG_TASKS:
                prompts = long_prompts(tokenizer, task, args.length, args.prompts, TEST)
                cell["right"][task] = answers_right(model, tokenizer, prompts, batch_size=10)
            text = (base_path("embedded-long") / "held_out.txt").read_text()
            cell["perplexity"] = perplexity(model, tokenizer, text, args.length, windows=16384 // args.length)
        write(path, cell)
        print(name, trained, seed, {task: fmean(right) for task, right in cell["right"].items()}, flush=True)
    return json.loads(path.read_text())


def report(plans: dict[str, moa.SpanPlan | None], cells: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """Scores, and what training under a plan gained, of the seeds that are done."""
    right: dict[tuple[str, str], list[list[bool]]] = {}  # seeds x prompts of all tasks
    for cell in cells:
        right.setdefault((cell["plan"], cell["trained"]), []).append([*chain(*cell["right"].values())])
    gains = [
        {"plan": name, "over": over, **gain(np.array(right[name, name]), np.array(right[name, over]))}
        for name in args.plans
        for over in ("none", "dense")
    ]
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    used = {name: facts(plan, args) for name, plan in plans.items() if plan is not None}
    write(args.out, {"settings": settings, "plans": used, "cells": [shares(cell) for cell in cells], "gains": gains})
    print(*gains, sep="\n", flush=True)


def shares(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell with shares and their Wilson intervals instead of single answers."""
    right = {task: [fmean(found), *wilson(sum(found), len(found))] for task, found in cell["right"].items()}
    return {**cell, "right": right}


def facts(plan: moa.SpanPlan, args: argparse.Namespace) -> dict[str, Any]:
    """What a plan keeps, and by task, the share of prompts whose answer its longest head still holds at the end."""
    model, tokenizer = load("embedded-long")
    spans = plan.spans(args.length)
    dense = moa.SpanPlan.dense(len(spans), len(spans[0])).kv_bytes(model, args.length)
    gone = range(plan.sink, args.length - max(map(max, spans)) + plan.sink)
    places = {
        task: [int(p.depth * args.length) for p in long_prompts(tokenizer, task, args.length, args.prompts, TEST)]
        for task in LONG_TASKS
    }
    reach = {task: fmean(place not in gone for place in found) for task, found in places.items()}
    return {"kv_share": plan.kv_bytes(model, args.length) / dense, "spans": spans, "reach": reach}


def gain(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Mean difference in the share of right answers, over all tasks, and its bootstrap over seeds and prompts."""
    rng, differences = np.random.default_rng(0), ours.astype(float) - theirs
    seeds, prompts = differences.shape
    drawn = [
        differences[rng.integers(seeds, size=seeds)][:, rng.integers(prompts, size=prompts)].mean() for _ in range(4000)
    ]
    return {"gain": float(differences.mean()), "interval_95": np.quantile(drawn, [0.025, 0.975]).tolist()}


if __name__ == "__main__":
    main()
