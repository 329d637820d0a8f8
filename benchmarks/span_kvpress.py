"""Span plans beside the methods of kvpress: right answers to the prompts of `span_quality.py` at equal KV bytes.

    python benchmarks/span_kvpress.py --write-prompts prompts.json          # where MoA is installed
    python benchmarks/span_kvpress.py --prompts prompts.json                # where kvpress 0.5.5 is installed

kvpress needs transformers below 5.3, hence an environment of its own; the second step imports torch, transformers
and kvpress alone. Scores compare with those of `benchmarks/results/span_quality.json`, whose dense row must come out
again.

Two protocols. "blind" (that of kvpress's own benchmarks): the context is read and compressed, then the question is
fed. "aware": the whole prompt is read and compressed at its end, so a method may choose by the question, and the first
token of the answer comes from the dense reading. Presses have kvpress's defaults besides the ratio. AdaKV masks
entries instead of dropping them; its share counts what is not masked. A cell is on disk when it is done, and a
stopped run goes on.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
PROTOCOLS = ("blind", "aware")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    step = parser.add_mutually_exclusive_group(required=True)
    step.add_argument("--write-prompts", type=Path, metavar="FILE", help="make the prompts; needs MoA")
    step.add_argument("--prompts", type=Path, metavar="FILE", help="answer them under kvpress")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048], help="of the prompts that are made")
    parser.add_argument("--number", type=int, default=40, help="prompts made per task and length")
    parser.add_argument("--model", type=Path, default=HERE.parent / "src" / "moa" / "assets" / "long-context")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.75], help="kept shares")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "span_kvpress.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.write_prompts:
        write(args.write_prompts, made(args.lengths, args.number))
    else:
        print(table(measured(args)))


def made(lengths: list[int], number: int) -> dict[str, Any]:
    """The test prompts of `span_quality.py` as tokens, the place of each question, and the answers."""
    from span_quality import TEST, load  # with MoA, which the other step does without

    from moa.evaluation.retrieval import long_prompts
    from moa.tasks.long_context import LONG_TASKS

    _, tokenizer = load("embedded-long")
    cells = []
    for length in lengths:
        for task in LONG_TASKS:
            rows = []
            for prompt in long_prompts(tokenizer, task, length, number, TEST):
                at = prompt.prompt.rindex(" Copy:" if task == "copying" else " Question:")
                context, question = (tokenizer(part)["input_ids"] for part in (prompt.prompt[:at], prompt.prompt[at:]))
                if context + question != tokenizer(prompt.prompt)["input_ids"]:
                    raise ValueError(f"{task} {length}: a token spans the end of the context and the question")
                rows.append({"context": context, "question": question, "answer": prompt.answer})
            new = max(len(tokenizer(row["answer"])["input_ids"]) for row in rows)
            cells.append({"task": task, "length": length, "max_new_tokens": new, "prompts": rows})
    return {"model": "embedded-long", "seed": TEST, "cells": cells}


def presses() -> dict[str, Callable[[float], Any]]:
    """kvpress's methods by name, each made for a compression ratio."""
    import kvpress  # absent from MoA's environment

    k: Any = kvpress
    return {
        "StreamingLLM": k.StreamingLLMPress,
        "Knorm": k.KnormPress,
        "TOVA": k.TOVAPress,
        "SnapKV": k.SnapKVPress,
        "PyramidKV": k.PyramidKVPress,
        "AdaKV + SnapKV": lambda ratio: k.AdaKVPress(k.SnapKVPress(ratio)),
        "ExpectedAttention": k.ExpectedAttentionPress,
        "AdaKV + ExpectedAttention": lambda ratio: k.AdaKVPress(k.ExpectedAttentionPress(ratio)),
    }


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method's cells, from the result file where they are there already.

    Raises:
        ValueError: the result file is of other prompts or versions.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = args.prompts.read_bytes()
    asked = json.loads(text)
    about = {
        "model": asked["model"],
        "settings": {"seed": asked["seed"], "prompts": len(asked["cells"][0]["prompts"]), "dtype": "float32"},
        "prompts_sha256": hashlib.sha256(text).hexdigest(),
        "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")},
    }
    cells: list[dict[str, Any]] = []
    if args.out.exists():
        old = json.loads(args.out.read_text())
        cells = old.pop("cells")
        if old != about:
            raise ValueError(f"{args.out} is of other prompts or versions; move it or choose another --out")
    methods = presses()
    plans: dict[tuple[str, float], Any] = {("dense", 1.0): None}
    plans |= {(method, density): methods[method](1 - density) for density in args.densities for method in methods}
    for asked_cell in asked["cells"]:
        for protocol in PROTOCOLS:
            place = {"task": asked_cell["task"], "length": asked_cell["length"], "protocol": protocol}
            done = {(cell["method"], cell["density"]) for cell in cells if cell.items() >= place.items()}
            left = {name: press for name, press in plans.items() if name not in done}
            for (method, density), found in scored(model, tokenizer, left, asked_cell, protocol).items():
                cells.append({"method": method, "density": density} | place | found)
                print(method, density, *place.values(), f"{found['score']:.3f} at {found['share']:.3f}", flush=True)
            write(args.out, about | {"cells": cells})
    return cells


@torch.inference_mode()
def scored(
    model: Any, tokenizer: Any, plans: dict[tuple[str, float], Any], cell: dict[str, Any], protocol: str
) -> dict[tuple[str, float], dict[str, float]]:
    """Share of right answers, by the rule of `moa.evaluation.retrieval`, and mean share of the dense cache."""
    sums = {name: [0.0, 0.0] for name in plans}
    for row in cell["prompts"] if plans else []:
        context, question = row["context"], row["question"]
        read, fed = (context, question) if protocol == "blind" else (context + question, [])
        dense, seen, logits = prefill(model, read)
        for name, press in plans.items():
            cache = compressed(model, press, dense, seen)
            said, share = answer(model, cache, logits, len(read), fed, cell["max_new_tokens"])
            text, wanted = tokenizer.decode(said, skip_special_tokens=True).strip(), row["answer"].strip()
            sums[name][0] += text.startswith(wanted) and not text[len(wanted) : len(wanted) + 1].isalnum()
            sums[name][1] += share
    n = len(cell["prompts"])
    return {name: {"score": right / n, "share": share / n} for name, (right, share) in sums.items()}


def prefill(model: Any, tokens: list[int]) -> tuple[Any, list[dict[str, Any]], torch.Tensor]:
    """Dense cache of a text, what every attention layer was given, and the logits of the next token."""
    from transformers import DynamicCache

    seen: list[dict[str, Any]] = []

    def note(module: torch.nn.Module, args: Any, given: dict[str, Any], output: Any) -> None:
        seen.append(given)

    hooks = [layer.self_attn.register_forward_hook(note, with_kwargs=True) for layer in model.model.layers]
    cache = DynamicCache()
    logits = model(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1).logits
    for hook in hooks:
        hook.remove()
    return cache, seen, logits


def compressed(model: Any, press: Any, dense: Any, seen: list[dict[str, Any]]) -> Any:
    """A copy of the dense cache after the press's own forward hooks.

    A press reads densely and leaves the layer's output as it is, so that one reading serves all of them: the hooks are
    called afterwards, with what they would have been called with.
    """
    cache = copy.deepcopy(dense)
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None  # AdaKV's, of the press before
    if press is not None:
        with press(model):
            for layer, given in zip(model.model.layers, seen, strict=True):
                press.forward_hook(layer.self_attn, [], given | {"past_key_values": cache}, [None, None])
    return cache


def answer(
    model: Any, cache: Any, logits: torch.Tensor, place: int, fed: list[int], new: int
) -> tuple[list[int], float]:
    """Greedy answer after ``place`` tokens read and ``fed`` to come, and the share of a dense cache held at its end.

    kvpress's pipeline adds a line feed to the question, which this model does not know. Tokens are fed one by one,
    because PyramidKV's layers differ in length and one causal mask would not fit all of them.
    """
    said: list[int] = []
    waiting = list(fed)
    while True:
        if waiting:
            token = waiting.pop(0)
        else:
            said.append(token := int(logits[0, -1].argmax()))
            if len(said) == new or token == model.config.eos_token_id:
                break
        logits = model(torch.tensor([[token]]), past_key_values=cache, position_ids=torch.tensor([[place]])).logits
        place += 1
    heads = cache.layers[0].keys.shape[1]
    kept = sum(heads * layer.keys.shape[2] for layer in cache.layers)
    masked = (layer.self_attn.masked_key_indices for layer in model.model.layers)
    kept -= sum(len(places[0]) for places in masked if places is not None)
    return said, kept / (place * heads * len(cache.layers))


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON; the file appears whole or not at all."""
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(draft, path)


def table(cells: list[dict[str, Any]]) -> str:
    """One line per method, protocol and density, the scores of each task by length."""
    columns = list(dict.fromkeys((cell["task"], cell["length"]) for cell in cells))
    rows = list(dict.fromkeys((cell["density"], cell["protocol"], cell["method"]) for cell in cells))
    score = {(c["density"], c["protocol"], c["method"], c["task"], c["length"]): c["score"] for c in cells}
    head = "| kept | question | method | " + " | ".join(f"{task} {length}" for task, length in columns) + " |"
    body = []
    for density, protocol, method in rows:
        found = (score.get((density, protocol, method, *column), float("nan")) for column in columns)
        body.append(f"| {density:.0%} | {protocol} | {method} | " + " | ".join(f"{x:.2f}" for x in found) + " |")
    return "\n".join([head, "|" + "---|" * (len(columns) + 3), *body])


if __name__ == "__main__":
    main()
