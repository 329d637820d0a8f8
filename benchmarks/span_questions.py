"""What span plans keep of a model's retrieval: numbers hidden in running text, four to a text and all asked for.

    python benchmarks/span_questions.py --text novels.txt --plans smollm2-spans/density-0.5/span_plan.json

Any long text will do; docs/spans.md used English novels up to 1930. The numbers are the magic numbers of RULER's
needles (Hsieh et al. 2024), a wording that no recipe calibrates on. All answers of a text are read in one pass, each
after its beginning and after the right answers before it; one is right if each of its tokens is the most likely one.
Every cell is a file, so that a stopped run goes on. `moa bench benchmarks/studies/span-facts.yaml` asks other facts,
one to a text, with answers that the model writes itself.

`--presses SnapKVPress@0.5 ...` are methods of kvpress with the share that they keep. They need an environment that has
it, where plans do not run: `--uniform --presses ...` there, then everything with the same `--work` here. A press drops
what is cached once a text has been read up to some point: the questions, which it then has not seen, or, as
`SnapKVPress+question@0.5`, the beginning of an answer, where each question has a reading of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from moa.evaluation.retrieval import TextSet, text_losses
from moa.files import write_text
from moa.models import load
from moa.spans import SpanPlan, apply_spans
from moa.spans.baselines import uniform_window
from moa.spans.evidence.conversation import conversation, token_ids
from moa.spans.evidence.items import Item, answers_kept, predicted
from moa.spans.evidence.sources import Passage, Turn
from moa.studies.spans import press
from moa.tasks.facts import Form, fact_texts

CITIES = "Chicago Nairobi Lisbon Toronto Sydney Mumbai Dublin Warsaw Seattle Havana Athens Manila Boston Cairo Denver"
FORM: Form = (
    CITIES.split(),
    "One of the special magic numbers for {} is: {}.",
    "What is the special magic number for {} mentioned in the text?",
    "The special magic number for {} mentioned in the text is",
)
DRAWS = 4000
KNOWN = "+question"


@dataclass(frozen=True)
class Asked:
    """A conversation about a text.

    Attributes:
        item: its tokens and which of them are answers.
        context: tokens before its first question.
        answer: tokens before its first answer.
    """

    item: Item
    context: int
    answer: int


@dataclass(frozen=True)
class Pressed:
    """The model with a cache of which a press drops its part behind the first ``known`` tokens."""

    model: Any
    press: str
    share: float
    known: int

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: Tensor) -> Any:
        """Logits at the places ``logits_to_keep``, none of them before the last known token."""
        cache = DynamicCache()
        with press(f"kvpress:{self.press}", self.share)(self.model):
            first = self.model(input_ids=input_ids[:, : self.known], past_key_values=cache, logits_to_keep=1).logits
        places = torch.arange(self.known, input_ids.shape[1], device=self.device)[None]  # what was dropped counts
        rest = self.model(input_ids=input_ids[:, self.known :], past_key_values=cache, position_ids=places).logits
        return SimpleNamespace(logits=torch.cat([first, rest], 1)[:, logits_to_keep - self.known + 1])

    __call__ = forward


def main() -> None:
    args = parsed()
    torch.set_num_threads(1)
    model, tokenizer = load(args.base, dtype=torch.bfloat16)
    model.eval()
    text = args.text.read_text(encoding="utf-8")
    args.work.mkdir(parents=True, exist_ok=True)
    cells = []
    for length in args.lengths:
        passages = list(itertools.islice(passages_of(tokenizer, text, length), args.texts))
        reading = TextSet(args.text.stem, text[: 40 * length], length, windows=args.windows)
        measures = {
            name: partial(under_plan, model, tokenizer, plan, passages, reading)
            for name, plan in methods(model, length, args.plans, args.uniform)
        } | {name: partial(pressed, model, tokenizer, name, passages) for name in args.presses}
        for name, measure in measures.items():
            file = args.work / f"{length}-{name}.json"
            if not file.exists():
                write_text(file, json.dumps({"method": name, "length": length, **measure()}))
            cells.append(json.loads(file.read_text()))
            print(line(cells, cells[-1]), flush=True)
    write_text(args.out, json.dumps(cells, indent=1) + "\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="to hide facts in; of a few hundred thousand tokens")
    parser.add_argument("--plans", type=Path, nargs="*", default=[], help="plan files, each named by its folder")
    parser.add_argument("--uniform", type=float, nargs="*", default=[0.5, 0.25], help="shares for one window for all")
    parser.add_argument("--presses", nargs="*", default=[], help="of kvpress, such as SnapKVPress+question@0.5")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--texts", type=int, default=16, help="of each length, four questions each")
    parser.add_argument("--windows", type=int, default=8, help="of running text, for the perplexity")
    parser.add_argument("--work", type=Path, default=Path("runs/span-questions"), help="for cells")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/span_questions.json"))
    return parser.parse_args()


def passages_of(tokenizer: Any, text: str, length: int) -> Iterator[Passage]:
    """Texts of about ``length`` tokens with their questions, endlessly many."""
    rng = random.Random(f"needles/{length}")

    def count(piece: str) -> int:
        return len(token_ids(tokenizer, piece))

    for number in itertools.count():
        start = rng.randrange(len(text) - 40 * length)
        part = text[start : start + 8 * length]
        one = next(fact_texts(part, length, count, f"needles/{number}", [FORM]))
        yield Passage(one.context, tuple(Turn(asked.question, asked.start, asked.answer) for asked in one.asked))


def asked(tokenizer: Any, passage: Passage) -> Asked:
    """A passage with all of its questions, in tokens; all answers are supervised."""
    tokens, answers = conversation(tokenizer, passage)
    unasked = [replace(turn, question="?") for turn in passage.turns]
    others, _ = conversation(tokenizer, replace(passage, turns=tuple(unasked)))
    marked = set(itertools.chain(*answers))
    item = Item(tuple(tokens), tuple(place in marked for place in range(len(tokens))))
    context = next(place for place, (one, other) in enumerate(zip(tokens, others, strict=False)) if one != other)
    return Asked(item, context, answers[0].start)


def methods(model: Any, length: int, plans: list[Path], uniform: list[float]) -> Iterator[tuple[str, SpanPlan | None]]:
    """Names and plans, the dense model without one first."""
    yield "dense", None
    for path in plans:
        yield "-".join(path.parent.parts[-2:]), SpanPlan.load(path)
    for share in uniform:
        yield f"uniform-{share:g}", uniform_window(model, share, length)


def under_plan(
    model: Any, tokenizer: Any, plan: SpanPlan | None, passages: list[Passage], reading: TextSet
) -> dict[str, Any]:
    """Kept bytes, answers text by text, and the loss on running text window by window."""
    items = [asked(tokenizer, passage).item for passage in passages]
    with nullcontext() if plan is None else apply_spans(model, plan):
        found = [answers(model, item) for item in items]
        losses = text_losses(model, tokenizer, reading)
    return {"bytes": density(plan, items), **by_text(found), "reading": losses}


def pressed(model: Any, tokenizer: Any, name: str, passages: list[Passage]) -> dict[str, Any]:
    """Answers text by text when a press keeps its share of the cache of what it has seen."""
    what, _, share = name.partition("@")
    kind, known = what.removesuffix(KNOWN), what.endswith(KNOWN)
    found = []
    for passage in passages:
        alone = [replace(passage, turns=(turn,)) for turn in passage.turns] if known else [passage]
        texts = [asked(tokenizer, one) for one in alone]
        parts = [
            answers(Pressed(model, kind, float(share), one.answer if known else one.context), one.item) for one in texts
        ]
        found.append((fmean(right for right, _ in parts), fmean(loss for _, loss in parts)))
    return {"bytes": float(share), **by_text(found), "reading": []}


def answers(model: Any, item: Item) -> tuple[float, float]:
    """The share of right answers and the mean loss of their tokens."""
    loss, hits = predicted(model, item)
    return float(np.mean(answers_kept(item, hits))), float(loss.mean())


def by_text(found: list[tuple[float, float]]) -> dict[str, list[float]]:
    """Right answers and losses as cells have them."""
    return {"right": [right for right, _ in found], "losses": [loss for _, loss in found]}


def density(plan: SpanPlan | None, items: list[Item]) -> float:
    """Kept share of the KV cache, a mean over texts."""
    return 1.0 if plan is None else float(np.mean([plan.kv_density(len(item.tokens)) for item in items]))


def line(cells: list[dict[str, Any]], cell: dict[str, Any]) -> str:
    """A row of a table; intervals are of 95 %, over texts, paired with the dense model's."""
    dense = next(one for one in cells if one["method"] == "dense" and one["length"] == cell["length"])
    ours, theirs = np.array(cell["right"]), np.array(dense["right"])
    drawn = np.random.default_rng(0).integers(len(ours), size=(DRAWS, len(ours)))
    low, high = np.quantile(ours[drawn].mean(1) / np.maximum(theirs[drawn].mean(1), 1e-9), [0.025, 0.975])
    reading = np.exp(np.mean(cell["reading"]) - np.mean(dense["reading"])) if cell["reading"] else np.nan
    return (
        f"| {cell['length']} | {cell['method']} | {cell['bytes']:.0%} | {ours.mean():.2f} | "
        f"{ours.mean() / theirs.mean():.2f} ({low:.2f} to {high:.2f}) | {np.mean(cell['losses']):.2f} | {reading:.3f} |"
    )


if __name__ == "__main__":
    main()
