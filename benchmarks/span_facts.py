"""What do span plans keep of a real model's retrieval? Facts in texts and wordings that nobody calibrated on.

    python benchmarks/span_facts.py --work runs/span-facts --base smollm2 \\
        --plans smollm2-spans/density-0.5/span_plan.json smollm2-spans/density-0.25/span_plan.json

Every plan is measured at every length beside the dense model and a uniform window of at least as many bytes: the share
of answers that are right to the last digit (given the answer's beginning and the digits before), their loss, and the
perplexity of running text. Facts, questions and keys (`FORMS`) are other ones than those of `moa.tasks.facts`, and the
text is Python's own reference manual. Every cell is written at once, so that a stopped run continues. Differences to
dense are paired by text, with 95 % bootstrap intervals over texts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pydoc_data.topics
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moa.evaluation.results import write
from moa.evaluation.retrieval import perplexity
from moa.spans import SpanPlan, apply_spans
from moa.spans.baselines import BLOCK, uniform_window
from moa.spans.evidence.conversation import conversation, token_ids
from moa.spans.evidence.items import Item, answers_kept, predicted
from moa.spans.evidence.sources import Passage, Turn
from moa.tasks.facts import Form, fact_texts
from moa.training.base import load_base

SHIPS = "Aurora Falcon Neptune Victoria Orion Marina Phoenix Odessa Castor Juno Atlas Minerva".split()  # noqa: SIM905
FRUITS = "apples pears plums cherries grapes lemons figs peaches melons quinces dates limes".split()  # noqa: SIM905
COLOURS = "red blue green yellow white black brown grey orange purple golden silver".split()  # noqa: SIM905
FORMS: tuple[Form, ...] = (
    (SHIPS, "The ship {} carries {} crates.", "How many crates does the ship {} carry?", "The ship {} carries"),
    (FRUITS, "A cart of {} costs {} coins.", "How many coins does a cart of {} cost?", "A cart of {} costs"),
    (COLOURS, "The {} door opens with key {}.", "Which key opens the {} door?", "The {} door opens with key"),
)


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    model, tokenizer = load_base(args.base, args.dtype)
    model.eval()
    args.work.mkdir(parents=True, exist_ok=True)
    cells = [cell for length in args.lengths for cell in cells_at(model, tokenizer, length, args)]
    settings = {"base": args.base, "dtype": args.dtype, "texts": args.texts, "seed": args.seed}
    write(args.out, {"settings": settings, "cells": cells})
    print(table(cells))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="cells; a stopped run goes on from them")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--plans", type=Path, nargs="+", required=True, help="plan files")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--texts", type=int, nargs="+", default=[15], help="of each length, four questions each")
    parser.add_argument("--windows", type=int, default=2, help="of running text, for the perplexity; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/span_facts.json"))
    return parser.parse_args()


def manual() -> str:
    """Python's reference manual, as running text."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))[:300_000]


def items_of(tokenizer: Any, length: int, count: int, seed: int) -> list[Item]:
    """Conversations of about ``length`` tokens whose answers are all supervised."""
    made = fact_texts(manual(), length, lambda text: len(token_ids(tokenizer, text)), f"report/{seed}", FORMS)
    items = []
    for one in itertools.islice(made, count):
        turns = tuple(Turn(asked.question, asked.start, asked.answer) for asked in one.asked)
        tokens, answers = conversation(tokenizer, Passage(one.context, turns))
        marked = {place for places in answers for place in places}
        items.append(Item(tuple(tokens), tuple(place in marked for place in range(len(tokens)))))
    return items


def cells_at(model: Any, tokenizer: Any, length: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Cells of one length, from disk where they are there; every plan is followed by its uniform window."""
    texts = args.texts[min(args.lengths.index(length), len(args.texts) - 1)]
    items = items_of(tokenizer, length, texts, args.seed)
    methods: list[tuple[str, SpanPlan | None]] = [("dense", None)]
    for path in args.plans:
        found = SpanPlan.load(path)
        name = path.parent.name if path.stem == "span_plan" else f"{path.parent.name}/{path.stem}"
        share = -(-found.kv_density(length) * length // BLOCK) * BLOCK / length  # whole blocks, rounded up
        methods += [(name, found), (f"uniform beside {name}", uniform_window(model, min(share, 1.0), length))]
    cells = []
    for name, plan in methods:
        file = args.work / f"{length}-{texts}-{args.seed}-{name.replace('/', '-').replace(' ', '-')}.json"
        if not file.exists():
            write(file, {"method": name, "length": length, **measure(model, tokenizer, plan, items, length, args)})
        cells.append(json.loads(file.read_text()))
        print({key: value for key, value in cells[-1].items() if key not in ("right", "losses")}, flush=True)
    return cells


def measure(
    model: Any, tokenizer: Any, plan: SpanPlan | None, items: list[Item], length: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Right answers and losses text by text, and perplexity."""
    right, losses = [], []
    with nullcontext() if plan is None else apply_spans(model, plan):
        for item in items:
            loss, hits = predicted(model, item)
            kept = answers_kept(item, hits)
            right.append(sum(kept) / len(kept))
            losses.append(float(loss.mean()))
        windows = args.windows
        found = perplexity(model, tokenizer, manual(), length, windows=windows) if windows else None
    return {
        "kv_density": 1.0 if plan is None else plan.kv_density(length),
        "accuracy": float(np.mean(right)),
        "loss": float(np.mean(losses)),
        "perplexity": found,
        "right": right,
        "losses": losses,
    }


def interval(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """95 % of the bootstrapped mean difference, over texts."""
    difference = np.array(ours) - np.array(theirs)
    drawn = np.random.default_rng(0).integers(len(difference), size=(4000, len(difference)))
    low, high = np.quantile(difference[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def table(cells: list[dict[str, Any]]) -> str:
    """One line per cell, with the difference to dense and its interval."""
    lines = ["| tokens | method | KV bytes | right | over dense | loss | perplexity | difference to dense, 95 % |"]
    lines.append("|" + "---|" * 8)
    dense = {cell["length"]: cell for cell in cells if cell["method"] == "dense"}
    for cell in cells:
        base = dense[cell["length"]]
        low, high = interval(cell["right"], base["right"])
        over = cell["accuracy"] / max(base["accuracy"], 1e-9)
        reading = "" if cell["perplexity"] is None else f"{cell['perplexity']:.2f}"
        lines.append(
            f"| {cell['length']} | {cell['method']} | {cell['kv_density']:.1%} | {cell['accuracy']:.2f} | {over:.2f} "
            f"| {cell['loss']:.3f} | {reading} | {low:+.2f} to {high:+.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
