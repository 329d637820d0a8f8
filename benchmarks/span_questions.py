"""What span plans keep of a model's retrieval: numbers hidden in running text, four to a text and all asked for.

    python benchmarks/span_questions.py --text novels.txt --plans smollm2-spans/density-0.5/span_plan.json

Any long text will do; docs/spans.md used English novels up to 1930. The numbers are the magic numbers of RULER's
needles (Hsieh et al. 2024), a wording that no recipe calibrates on. All answers of a text are read in one pass, each
after its beginning and after the right answers before it; one is right if each of its tokens is the most likely one.
Every cell is a file, so that a stopped run goes on. `moa bench benchmarks/studies/span-facts.yaml` asks other facts,
one to a text, with answers that the model writes itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moa.evaluation.retrieval import TextSet, text_losses
from moa.files import write_text
from moa.models import load
from moa.spans import SpanPlan, apply_spans
from moa.spans.baselines import uniform_window
from moa.spans.evidence.conversation import conversation, token_ids
from moa.spans.evidence.items import Item, answers_kept, predicted
from moa.spans.evidence.sources import Passage, Turn
from moa.tasks.facts import Form, fact_texts

CITIES = "Chicago Nairobi Lisbon Toronto Sydney Mumbai Dublin Warsaw Seattle Havana Athens Manila Boston Cairo Denver"
FORM: Form = (
    CITIES.split(),
    "One of the special magic numbers for {} is: {}.",
    "What is the special magic number for {} mentioned in the text?",
    "The special magic number for {} mentioned in the text is",
)
DRAWS = 4000


def main() -> None:
    args = parsed()
    torch.set_num_threads(1)
    model, tokenizer = load(args.base, dtype=torch.bfloat16)
    model.eval()
    text = args.text.read_text(encoding="utf-8")
    args.work.mkdir(parents=True, exist_ok=True)
    cells = []
    for length in args.lengths:
        items = list(itertools.islice(items_of(tokenizer, text, length), args.texts))
        reading = TextSet(args.text.stem, text[: 40 * length], length, windows=args.windows)
        for name, plan in methods(model, length, args.plans, args.uniform):
            file = args.work / f"{length}-{name}.json"
            if not file.exists():
                with nullcontext() if plan is None else apply_spans(model, plan):
                    found = measured(model, tokenizer, items, reading)
                write_text(file, json.dumps({"method": name, "length": length, "bytes": density(plan, items), **found}))
            cells.append(json.loads(file.read_text()))
            print(line(cells, cells[-1]), flush=True)
    write_text(args.out, json.dumps(cells, indent=1) + "\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="to hide facts in; of a few hundred thousand tokens")
    parser.add_argument("--plans", type=Path, nargs="*", default=[], help="plan files, each named by its folder")
    parser.add_argument("--uniform", type=float, nargs="*", default=[0.5, 0.25], help="shares for one window for all")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--texts", type=int, default=16, help="of each length, four questions each")
    parser.add_argument("--windows", type=int, default=8, help="of running text, for the perplexity")
    parser.add_argument("--work", type=Path, default=Path("runs/span-questions"), help="for cells")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/span_questions.json"))
    return parser.parse_args()


def items_of(tokenizer: Any, text: str, length: int) -> Iterator[Item]:
    """Conversations of about ``length`` tokens whose answers are all supervised, endlessly many."""
    rng = random.Random(f"needles/{length}")

    def count(piece: str) -> int:
        return len(token_ids(tokenizer, piece))

    for number in itertools.count():
        start = rng.randrange(len(text) - 40 * length)
        part = text[start : start + 8 * length]
        one = next(fact_texts(part, length, count, f"needles/{number}", [FORM]))
        turns = tuple(Turn(asked.question, asked.start, asked.answer) for asked in one.asked)
        tokens, answers = conversation(tokenizer, Passage(one.context, turns))
        marked = set(itertools.chain(*answers))
        yield Item(tuple(tokens), tuple(place in marked for place in range(len(tokens))))


def methods(model: Any, length: int, plans: list[Path], uniform: list[float]) -> Iterator[tuple[str, SpanPlan | None]]:
    """Names and plans, the dense model without one first."""
    yield "dense", None
    for path in plans:
        yield "-".join(path.parent.parts[-2:]), SpanPlan.load(path)
    for share in uniform:
        yield f"uniform-{share:g}", uniform_window(model, share, length)


def measured(model: Any, tokenizer: Any, items: list[Item], reading: TextSet) -> dict[str, Any]:
    """Right answers and their loss text by text, and the loss on running text window by window."""
    right, losses = [], []
    for item in items:
        loss, hits = predicted(model, item)
        kept = answers_kept(item, hits)
        right.append(sum(kept) / len(kept))
        losses.append(float(loss.mean()))
    return {"right": right, "losses": losses, "reading": text_losses(model, tokenizer, reading)}


def density(plan: SpanPlan | None, items: list[Item]) -> float:
    """Kept share of the KV cache, a mean over texts."""
    return 1.0 if plan is None else float(np.mean([plan.kv_density(len(item.tokens)) for item in items]))


def line(cells: list[dict[str, Any]], cell: dict[str, Any]) -> str:
    """A row of a table; intervals are of 95 %, over texts, paired with the dense model's."""
    dense = next(one for one in cells if one["method"] == "dense" and one["length"] == cell["length"])
    ours, theirs = np.array(cell["right"]), np.array(dense["right"])
    drawn = np.random.default_rng(0).integers(len(ours), size=(DRAWS, len(ours)))
    low, high = np.quantile(ours[drawn].mean(1) / np.maximum(theirs[drawn].mean(1), 1e-9), [0.025, 0.975])
    reading = np.exp(np.mean(cell["reading"]) - np.mean(dense["reading"]))
    return (
        f"| {cell['length']} | {cell['method']} | {cell['bytes']:.0%} | {ours.mean():.2f} | "
        f"{ours.mean() / theirs.mean():.2f} ({low:.2f} to {high:.2f}) | {np.mean(cell['losses']):.2f} | {reading:.3f} |"
    )


if __name__ == "__main__":
    main()
