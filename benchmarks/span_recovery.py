"""Does an adapter that learns under a span plan win back what the plan costs?

    python benchmarks/span_recovery.py --plan span_plan.json

Trains Soft MoA on the embedded long-context model under the plan, on the tasks of `span_quality.py` with other seeds,
and measures retrieval dense, under the plan, and under the plan with the adapter; also the adapter trained and used
without the plan, so that plain task practice is not mistaken for repair.
"""

from __future__ import annotations

import argparse
import json
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from span_quality import load

import moa
from moa.evaluation.retrieval import long_prompts, retrieval
from moa.tasks.long_context import LONG_TASKS

TRAIN, TEST = 11, 3  # seeds


def rows(tokenizer: Any, length: int, n: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) token ids of all tasks, in random order."""
    found = []
    for task in LONG_TASKS:
        for prompt in long_prompts(tokenizer, task, length, n, TRAIN):
            found.append((tokenizer(prompt.prompt)["input_ids"], tokenizer(prompt.answer)["input_ids"]))
    random.Random(0).shuffle(found)
    return found


def train(model: Any, data: list[tuple[list[int], list[int]]], accumulate: int, rate: float) -> Any:
    """Soft MoA on the answers, one row at a time."""
    torch.manual_seed(0)
    model = get_peft_model(model, moa.preset("soft-moa")).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95))
    for number, (asked, said) in enumerate(data, start=1):
        ids = torch.tensor([asked + said])
        labels = torch.tensor([[-100] * len(asked) + said])
        (model(input_ids=ids, labels=labels, use_cache=False).loss / accumulate).backward()
        if number % accumulate == 0:
            left = 1 - number / len(data)
            optimiser.param_groups[0]["lr"] = rate * left
            optimiser.step()
            optimiser.zero_grad()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=80, help="training rows per task")
    parser.add_argument("--prompts", type=int, default=40, help="test prompts per task")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "span_recovery.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plan = moa.SpanPlan.load(args.plan)
    scores: dict[str, dict[str, float]] = {}
    for adapter in (False, True):
        for planned in (False, True):
            model, tokenizer = load("embedded-long")
            with moa.apply_spans(model, plan) if planned else nullcontext():
                if adapter:
                    model = train(model, rows(tokenizer, args.length, args.rows), accumulate=4, rate=args.rate)
                name = ("plan" if planned else "dense") + (" + adapter" if adapter else "")
                scores[name] = {
                    task: retrieval(model, tokenizer, task, args.length, args.prompts, seed=TEST, batch_size=5)
                    for task in LONG_TASKS
                }
            print(name, scores[name], flush=True)
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    share = plan.kv_bytes(model, args.length) / moa.SpanPlan.dense(3, 4).kv_bytes(model, args.length)
    args.out.write_text(json.dumps({"settings": settings, "kv_share": share, "scores": scores}, indent=1) + "\n")


if __name__ == "__main__":
    main()
