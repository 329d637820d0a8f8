"""Pretrain the long-context organism: a small GQA Llama that looks up, finds and copies over 2k tokens.

Contract: `python scripts/pretrain_long_context.py --novels FILE --work DIR --out DIR --minutes M` trains on generated
look-up and copying tasks and public domain novels (`long_context_data.py`) through lengths from 128 to 2048 tokens and
writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` load. The run is seeded and resumable: a step's rows
depend on the seed, the step and its length alone, and a checkpoint in `--work` is replaced atomically every few
minutes, so that killing it and starting the same command again goes on. `--tokens` instead of `--minutes` makes the
schedule independent of the machine's speed. Progress goes to stdout and `metrics.jsonl`.

Limits: CPU, float32, one thread. Only the CPU time of the process counts, so stopping it for a while (SIGSTOP, SIGCONT)
changes nothing. A different `--seed`, corpus or architecture needs a fresh `--work`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from long_context_data import MIXTURE, Rows, build_tokenizer
from long_context_init import draft_circuits
from muon import optimizers, schedule
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CURRICULUM = ((128, 0.15), (256, 0.2), (512, 0.2), (1024, 0.13), (2048, 0.32))  # length, share of the run
STEP_TOKENS = 2048  # per optimiser step, at least two rows
PEAK_LR = {"muon": 0.006, "adamw": 2e-3}
DECAY = 0.03  # of the matrices, per unit of learning rate
WARMUP, HOLD = 0.01, 0.55  # shares of the run
SAVE_SECONDS = 60
HELD_OUT = 1 / 50  # of the novels, at their end
NOVELS = 8_000_000  # characters read


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--novels", type=Path, required=True, help="a plain text file, 8 MB are enough")
    parser.add_argument("--work", type=Path, required=True, help="checkpoint, caches, metrics")
    parser.add_argument("--out", type=Path, required=True, help="the finished model's folder")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--minutes", type=float, help="CPU time; the schedule follows it")
    size.add_argument("--tokens", type=int, help="training tokens; the schedule follows them")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, np.ndarray]:
    """Tokenizer and tokenised novels `(tokens,)` uint16, cached in the work folder."""
    args.work.mkdir(parents=True, exist_ok=True)
    folder, cache = args.work / "tokenizer", args.work / "novels.npy"
    if not cache.exists():
        with args.novels.open() as file:
            text = file.read(NOVELS)
        tokenizer = build_tokenizer(text)
        tokenizer.save_pretrained(folder)
        parts = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
        ids = tokenizer(parts, verbose=False)["input_ids"]
        np.save(cache, np.concatenate([np.array(part, dtype=np.uint16) for part in ids]))
    return PreTrainedTokenizerFast.from_pretrained(folder), np.load(cache)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of 0.86 million parameters, three layers of four KV heads."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def length_at(progress: float) -> int:
    """Tokens per row at a progress in [0, 1]."""
    for length, share in CURRICULUM:
        progress -= share
        if progress < 0:
            return length
    return CURRICULUM[-1][0]


def losses(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, weights and hits of the tokens that count, each `(tokens,)`; logits only for them."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    counted = weights[:, 1:] > 0
    logits = model.lm_head(hidden[counted])
    target = ids[:, 1:][counted]
    return F.cross_entropy(logits, target, reduction="none"), weights[:, 1:][counted], logits.argmax(-1) == target


class Run:
    """Model, optimisers and position of the training."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.tokenizer, novels = prepare(args)
        cut = int(len(novels) * (1 - HELD_OUT))
        self.rows = Rows(self.tokenizer, novels[:cut], args.seed)
        self.held_out = Rows(self.tokenizer, novels[cut:], args.seed + 1)
        torch.manual_seed(args.seed)
        self.model = new_model(self.tokenizer)
        draft_circuits(self.model, args.seed)
        self.optims = optimizers(self.model, PEAK_LR, DECAY)
        self.peaks = [o.param_groups[0]["lr"] for o in self.optims]
        self.checkpoint = args.work / "checkpoint.pt"
        self.step, self.tokens, self.spent = 0, 0, 0.0
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint)
            self.model.load_state_dict(state["model"])
            for o, s in zip(self.optims, state["optimizers"], strict=True):
                o.load_state_dict(s)
            self.step, self.tokens, self.spent = state["step"], state["tokens"], state["spent"]

    def progress(self) -> float:
        """Share of the run that is done."""
        return self.tokens / self.args.tokens if self.args.tokens else self.spent / (60 * self.args.minutes)

    def save(self) -> None:
        """Replace the checkpoint (a kill leaves the old or the new one), then log."""
        state = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optims]}
        state |= {"step": self.step, "tokens": self.tokens, "spent": self.spent}
        torch.save(state, self.checkpoint.with_suffix(".new"))
        os.replace(self.checkpoint.with_suffix(".new"), self.checkpoint)
        length = length_at(self.progress())
        record: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "minutes": round(self.spent / 60, 2)}
        record |= {"length": length, "held_out": self.evaluate(length)}
        with (self.args.work / "metrics.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)

    @torch.no_grad()
    def evaluate(self, length: int) -> dict[str, tuple[float, float]]:
        """By kind of row: loss in nats and share right of the answer tokens (of the novels: of all tokens)."""
        found = {}
        for kind in MIXTURE:
            rng = random.Random(f"{kind}/{length}")
            made = [self.held_out.row(rng, kind, length) for _ in range(max(2, 2048 // length))]
            ids, weights = (torch.tensor(part) for part in zip(*made, strict=True))
            loss, weight, hits = losses(self.model, ids, weights)
            counted = weight == weight.max()
            found[kind] = (round(loss[counted].mean().item(), 4), round(hits[counted].float().mean().item(), 4))
        return found

    def update(self) -> float:
        """One optimiser step; its loss."""
        progress = self.progress()
        for o, peak in zip(self.optims, self.peaks, strict=True):
            o.param_groups[0]["lr"] = peak * schedule(progress, WARMUP, HOLD)
        length = length_at(progress)
        rows = max(2, STEP_TOKENS // length)
        ids, weights = self.rows.batch(self.step, rows, length)
        loss, weight, _ = losses(self.model, ids, weights)
        mean = (loss * weight).sum() / weight.sum()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for o in self.optims:
            o.step()
            o.zero_grad()
        self.step += 1
        self.tokens += rows * length
        return mean.item()


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the folder: bfloat16 weights, configs, tokenizer."""
    exported = new_model(tokenizer)
    exported.load_state_dict(model.state_dict())
    exported.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Run, or go on with, the training."""
    args = parse()
    torch.set_num_threads(1)
    run = Run(args)
    started, saved = time.process_time() - run.spent, run.spent
    mean = 0.0
    while run.progress() < 1:
        if run.spent - saved > SAVE_SECONDS:
            run.save()
            saved = run.spent
        loss = run.update()
        mean = loss if not mean else 0.98 * mean + 0.02 * loss
        run.spent = time.process_time() - started
        if run.step % 50 == 0:
            where = f"{run.spent / 60:.1f} min  {run.progress():.1%}  length {length_at(run.progress())}"
            print(f"step {run.step}  loss {mean:.3f}  {where}  {run.tokens} tokens", flush=True)
    run.save()
    export(run.model, run.tokenizer, args.out)


if __name__ == "__main__":
    main()
