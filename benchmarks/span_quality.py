"""What does a span plan cost in quality? Dense, a searched plan and simpler plans at equal real KV bytes.

    python benchmarks/span_quality.py --work runs/span-quality

The model is the embedded long-context organism, or any other with `--base`. Influence is measured on prompts that the
model answers itself; plans are searched per KV head for every density, the front is validated
at the longest length, and every plan is measured through `generate()` on line retrieval, needle retrieval and copying
by length, and on the perplexity of long text. Every cell (density x method x task x length) is written at once, so that
a stopped study continues; the picture and the table come last.

Baselines (`moa.spans.baselines`) get the same budget at every length: uniform sink and window, two classes of
heads by far influence, one span per layer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from moa.assets import base_path
from moa.evaluation.generation import generate
from moa.evaluation.results import write
from moa.evaluation.retrieval import long_prompts, perplexity, retrieval
from moa.spans import SpanPlan, apply_spans
from moa.spans.baselines import far_influence, layer_only, two_class, uniform_window
from moa.spans.evidence.influence import Influence, influence
from moa.spans.evidence.items import Item
from moa.spans.evidence.validation import validate
from moa.spans.search.plans import Limits, search
from moa.tasks.long_context import LONG_TASKS

PlanAt = Callable[[int], SpanPlan | None]  # of a length in tokens; None: dense
METHODS = ("searched", "uniform window", "two classes", "layer only")
CALIBRATION, VALIDATION, TEST = 1, 2, 3  # seeds of the prompts


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args.base)
    plans: dict[tuple[str, float], PlanAt] = {("dense", 1.0): lambda length: None}
    for density in args.densities:
        for method, plan in plans_at(model, tokenizer, density, args).items():
            plans[method, density] = plan
    cells = [
        cell
        for (method, density), plan in plans.items()
        for cell in measured(model, tokenizer, method, density, plan, args)
    ]
    kept = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    write(args.out.with_suffix(".json"), {"model": args.base, "settings": kept, "cells": cells})
    print(table(cells))
    if args.densities:
        picture(cells, args.out.with_suffix(".svg"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="influence, plans and cells; a stopped study goes on")
    parser.add_argument("--base", default="embedded-long", help="embedded-long, or a model's folder")
    parser.add_argument("--text", type=Path, help="for perplexity; default: the organism's held-out text")
    parser.add_argument("--densities", type=float, nargs="*", default=[0.5, 0.25], help="none: dense only")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--profiled", type=int, nargs="+", default=[512, 1024, 2048], help="lengths of the influence")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--items", type=int, default=8, help="calibration prompts per task and length")
    parser.add_argument("--prompts", type=int, default=50, help="test prompts per task and length")
    parser.add_argument("--batch-size", type=int, default=5)
    parser.add_argument("--step", type=int, default=128, help="tokens between the offsets of the search grid")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/span_quality"))
    return parser.parse_args()


def load(base: str) -> tuple[Any, Any]:
    """Model in float32 and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = base_path(base) if base.startswith("embedded") else base
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def plans_at(model: Any, tokenizer: Any, density: float, args: argparse.Namespace) -> dict[str, PlanAt]:
    """Every method's plan at a density; baselines are made anew for every length, so that their bytes are right."""
    args.work.mkdir(parents=True, exist_ok=True)
    lost = {n: influences(model, tokenizer, n, args) for n in args.profiled}
    scores = far_influence(lost[max(lost)].mean())
    made: dict[str, PlanAt] = {
        "uniform window": lambda length: uniform_window(model, density, length),
        "two classes": lambda length: two_class(model, density, length, scores),
        "layer only": lambda length: layer_only(model, density, length, scores),
    }
    if "searched" in args.methods:
        plan = searched(model, tokenizer, {n: found.mean() for n, found in lost.items()}, density, args)
        plan.save(args.work / f"plan-searched-{density}.json")
        made["searched"] = lambda length: plan
    return {method: made[method] for method in args.methods}


def influences(model: Any, tokenizer: Any, length: int, args: argparse.Namespace) -> Influence:
    """Influence of one length, on the model's own answers."""
    items = calibration(model, tokenizer, length, args.items, CALIBRATION)
    return influence(model, items, length, save_to=args.work / f"influence-{length}.safetensors")


def calibration(model: Any, tokenizer: Any, length: int, n: int, seed: int) -> list[Item]:
    """Prompts of all tasks with the model's greedy answers, which alone are supervised."""
    items = []
    for task in LONG_TASKS:
        prompts = long_prompts(tokenizer, task, length, n, seed)
        texts = [prompt.prompt for prompt in prompts]
        new = max(len(tokenizer(prompt.answer)["input_ids"]) for prompt in prompts)
        for places, answers in generate(model, tokenizer, texts, max_new_tokens=new, batch_size=4):
            for place, answer in zip(places, answers, strict=True):
                asked, said = tokenizer(texts[place])["input_ids"], tokenizer(answer)["input_ids"]
                marks = [False] * len(asked) + [True] * len(said)
                items.append(Item(tuple(asked + said), tuple(marks)))
    return items


def searched(
    model: Any, tokenizer: Any, lost: dict[int, torch.Tensor], density: float, args: argparse.Namespace
) -> SpanPlan:
    """The plan of the front that answers best at the longest length."""
    done = args.work / f"plan-searched-{density}.json"
    if done.exists():
        return SpanPlan.load(done)
    limits = Limits(density=density, step=args.step, extend=tuple(n for n in args.lengths if n not in lost))
    front = search(lost, limits, model=args.base)
    items = calibration(model, tokenizer, max(args.lengths), max(2, args.items // 2), VALIDATION)
    return validate(model, [candidate.plan for candidate in front], items, max(args.lengths)).plan


def measured(
    model: Any, tokenizer: Any, method: str, density: float, plan_at: PlanAt, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A method's cells, from disk where they are there."""
    dense = SpanPlan.dense(model.config.num_hidden_layers, model.config.num_key_value_heads)
    for length in args.lengths:
        for task in (*LONG_TASKS, "perplexity"):
            name = f"cell-{method.replace(' ', '-')}-{density}-{task}-{length}.json"
            path = args.work / name
            if not path.exists():
                plan = plan_at(length)
                with apply(model, plan):
                    score = score_of(model, tokenizer, task, length, args)
                cell = {"method": method, "density": density, "task": task, "length": length, "score": score}
                cell["kv_bytes"] = (plan or dense).kv_bytes(model, length)
                cell["share"] = cell["kv_bytes"] / dense.kv_bytes(model, length)
                write(path, cell)
                print(
                    f"{method} {density} {task} {length}: {score:.3f} at {cell['share']:.3f} of the bytes", flush=True
                )
            yield json.loads(path.read_text())


def apply(model: Any, plan: SpanPlan | None) -> AbstractContextManager[Any]:
    return nullcontext() if plan is None else apply_spans(model, plan)


def score_of(model: Any, tokenizer: Any, task: str, length: int, args: argparse.Namespace) -> float:
    """Share of right answers, or perplexity."""
    if task == "perplexity":
        text = (args.text or base_path("embedded-long") / "held_out.txt").read_text()
        return perplexity(model, tokenizer, text, length, windows=max(1, 16384 // length))
    return retrieval(model, tokenizer, task, length, args.prompts, seed=TEST, batch_size=args.batch_size)


def table(cells: list[dict[str, Any]]) -> str:
    """One line per method and density, the scores of each task by length."""
    columns = list(dict.fromkeys((cell["task"], cell["length"]) for cell in cells))
    rows = list(dict.fromkeys((cell["method"], cell["density"]) for cell in cells))
    score = {(c["method"], c["density"], c["task"], c["length"]): c["score"] for c in cells}
    head = "| method | KV bytes | " + " | ".join(f"{task} {length}" for task, length in columns) + " |"
    body = [
        f"| {method} | {density:.0%} | "
        + " | ".join(f"{score[method, density, *column]:.2f}" for column in columns)
        + " |"
        for method, density in rows
    ]
    return "\n".join([head, "|" + "---|" * (len(columns) + 2), *body])


def picture(cells: list[dict[str, Any]], path: Path) -> None:
    """Scores by length: a row of panels per density, a panel per task, a line per method."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    densities = sorted({cell["density"] for cell in cells} - {1.0}, reverse=True)
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    figure, axes = plt.subplots(
        len(densities), len(tasks), figsize=(3 * len(tasks), 2.6 * len(densities)), squeeze=False, sharex=True
    )
    for row, density in zip(axes, densities, strict=True):
        for panel, task in zip(row, tasks, strict=True):
            for method in methods:
                points = [
                    (c["length"], c["score"])
                    for c in cells
                    if c["method"] == method and c["task"] == task and c["density"] in (density, 1.0)
                ]
                panel.plot(*zip(*points, strict=True), marker="o", label=method, ls="--" if method == "dense" else "-")
            panel.set_title(f"{task}, {density:.0%} of the KV bytes", fontsize=8)
            panel.set_xscale("log", base=2)
            if task != "perplexity":
                panel.set_ylim(-0.03, 1.03)
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("tokens", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
