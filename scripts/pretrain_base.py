"""Pretrain the embedded base model: tokenizer, weights and folder, from plain text.

Contract: `python scripts/pretrain_base.py --corpus DIR --work DIR --out DIR --minutes M` trains a
small Llama on public domain novels (`novels.txt` in `--corpus`) mixed with generated exercises
(`pretrain_corpus.py`), and writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` load. The
run is seeded and resumable: the batch of a step depends on the seed and the step alone, and a
checkpoint in `--work` is replaced atomically every few minutes, so that killing it and starting the
same command again goes on. `--steps` instead of `--minutes` makes the schedule independent of the
machine's speed. Progress and the held-out loss per component go to stdout and `metrics.jsonl`, the
model so far to `latest` in `--work`.

Limits: CPU, float32; `--processes` share the work of every step, one thread each (on a busy machine
that is faster than one process with as many threads). With `--minutes` the learning rate follows the
training time spent, so two runs differ; a different `--seed`, corpus or architecture needs a fresh
`--work`.
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
import pretrain_corpus as exercises
import torch
import torch.distributed as dist
from muon import optimizers, schedule
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"
VOCAB = 2048
WINDOW = 256  # tokens per training sequence
BATCH = 8  # sequences per step
NOVELS = 0.06  # of the sequences; the rest are exercises
PEAK_LR = {"muon": 0.02, "adamw": 5e-3}
WARMUP = 0.02  # share of the run
SAVE_SECONDS = 180
EVAL_SEQUENCES = 6  # per component


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder with novels.txt")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, caches, metrics")
    parser.add_argument("--out", type=Path, required=True, help="the finished model's folder")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="training time; the schedule follows the clock")
    length.add_argument("--steps", type=int, help=f"steps of {BATCH * WINDOW} tokens")
    parser.add_argument("--processes", type=int, default=2, help=f"a divisor of {BATCH}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if BATCH % args.processes:
        parser.error(f"--processes must divide {BATCH}, got {args.processes}")
    return args


def build_tokenizer(corpus: Path, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(f"tokenizer/{seed}")
    texts = [(corpus / "novels.txt").read_text()[:4_000_000]]
    for kind in exercises.KINDS:
        texts += [exercises.document(rng, kind) for _ in range(4000)]
    texts += [exercises.wording(rng) for _ in range(8000)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def load_novels(corpus: Path, work: Path, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Token ids of the novels, `(tokens,)` uint16, cached in the work folder."""
    cache = work / "novels.npy"
    if not cache.exists():
        text = (corpus / "novels.txt").read_text()
        parts = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
        batches = tokenizer(parts, verbose=False)["input_ids"]
        np.save(cache, np.concatenate([np.array(b, dtype=np.uint16) for b in batches]))
    return np.load(cache)


class Mixture:
    """Training and held-out sequences of all components.

    The last fiftieth of the novels is held out; held-out exercises come from seeds of their own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, novels: np.ndarray, seed: int):
        self.tokenizer, self.novels, self.seed = tokenizer, novels, seed
        self.cut = len(novels) - len(novels) // 50

    def batch(self, step: int) -> torch.Tensor:
        """The step's sequences, `(BATCH, WINDOW)` int64."""
        rng = random.Random(f"{self.seed}/{step}")
        rows = [
            self._window(rng, 0, self.cut) if rng.random() < NOVELS else self._exercises(rng, exercises.KINDS)
            for _ in range(BATCH)
        ]
        return torch.tensor(np.stack(rows), dtype=torch.long)

    def held_out(self, component: str) -> torch.Tensor:
        """Held-out sequences of "novels" or one kind, `(EVAL_SEQUENCES, WINDOW)` int64."""
        rng = random.Random(f"held-out/{self.seed}/{component}")
        rows = [
            self._window(rng, self.cut, len(self.novels))
            if component == "novels"
            else self._exercises(rng, {component: 1.0})
            for _ in range(EVAL_SEQUENCES)
        ]
        return torch.tensor(np.stack(rows), dtype=torch.long)

    def _window(self, rng: random.Random, start: int, end: int) -> np.ndarray:
        at = rng.randrange(start, end - WINDOW)
        return self.novels[at : at + WINDOW].astype(np.int64)

    def _exercises(self, rng: random.Random, kinds: dict[str, float]) -> np.ndarray:
        ids: list[int] = []
        while len(ids) < WINDOW:
            kind = rng.choices(list(kinds), weights=list(kinds.values()))[0]
            ids += self.tokenizer.encode(exercises.document(rng, kind) + END)
        return np.array(ids[:WINDOW], dtype=np.int64)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of 1.25 million parameters."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def evaluate(model: torch.nn.Module, data: Mixture) -> dict[str, float]:
    """Held-out loss in nats per token, by component."""
    losses = {}
    for component in ("novels", *exercises.KINDS):
        ids = data.held_out(component)
        losses[component] = round(model(input_ids=ids, labels=ids).loss.item(), 4)
    return losses


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the folder: bfloat16 weights, configs, tokenizer."""
    exported = new_model(tokenizer)
    exported.load_state_dict(model.state_dict())
    exported.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def prepare(args: argparse.Namespace) -> None:
    """Make what all processes read: the tokenizer and the tokenised text."""
    args.work.mkdir(parents=True, exist_ok=True)
    folder = args.work / "tokenizer"
    if not folder.exists():
        build_tokenizer(args.corpus, args.seed).save_pretrained(folder)
    load_novels(args.corpus, args.work, PreTrainedTokenizerFast.from_pretrained(folder))


class Run:
    """Model, optimisers and position of one process's share of the training."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work / "tokenizer")
        novels = load_novels(args.corpus, args.work, self.tokenizer)
        self.data = Mixture(self.tokenizer, novels, args.seed)
        self.model = new_model(self.tokenizer)
        self.optims = optimizers(self.model, PEAK_LR, 0.1)
        self.peaks = [o.param_groups[0]["lr"] for o in self.optims]
        self.forward = torch.compile(self.model)
        self.checkpoint = args.work / "checkpoint.pt"
        self.step, self.spent = 0, 0.0
        if self.checkpoint.exists():
            self.resume()

    def resume(self) -> None:
        """Take up the saved state."""
        state = torch.load(self.checkpoint)
        self.model.load_state_dict(state["model"])
        for o, s in zip(self.optims, state["optimizers"], strict=True):
            o.load_state_dict(s)
        self.step, self.spent = state["step"], state["spent"]

    def save(self) -> None:
        """Replace the checkpoint (a kill leaves the old or the new one), then log and export."""
        state = {"model": self.model.state_dict(), "step": self.step, "spent": self.spent}
        state["optimizers"] = [o.state_dict() for o in self.optims]
        torch.save(state, self.checkpoint.with_suffix(".new"))
        os.replace(self.checkpoint.with_suffix(".new"), self.checkpoint)
        record: dict[str, Any] = {"step": self.step, "tokens": self.step * BATCH * WINDOW}
        record["minutes"] = round(self.spent / 60, 2)
        record["held_out"] = evaluate(self.model, self.data)
        with (self.args.work / "metrics.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)
        export(self.model, self.tokenizer, self.args.work / "latest")

    def update(self, progress: float) -> float:
        """One optimiser step on this process's share of the batch; the share's loss."""
        for o, peak in zip(self.optims, self.peaks, strict=True):
            o.param_groups[0]["lr"] = peak * schedule(progress, WARMUP, 0.4)
        ids = self.data.batch(self.step)[dist.get_rank() :: dist.get_world_size()]
        loss = self.forward(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = [p.grad for p in self.model.parameters()]
        flat = torch.cat([g.flatten() for g in grads]) / dist.get_world_size()
        dist.all_reduce(flat)
        for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for o in self.optims:
            o.step()
            o.zero_grad()
        self.step += 1
        return loss.item()

    def clock(self, started: float) -> float:
        """The first process's training seconds, so that all processes agree."""
        spent = torch.tensor(time.monotonic() - started, dtype=torch.float64)
        dist.broadcast(spent, src=0)
        return spent.item()


def train(rank: int, args: argparse.Namespace) -> None:
    """Run, or go on with, the training in one of the processes; the first one writes the files."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    store = f"file://{(args.work / 'rendezvous').absolute()}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=args.processes)
    run = Run(args)
    launched, first, saved = time.monotonic(), run.step, run.spent
    started = launched - run.spent
    while True:
        run.spent = run.clock(started)
        progress = run.step / args.steps if args.steps else run.spent / (60 * args.minutes)
        if progress >= 1 or run.spent - saved > SAVE_SECONDS:
            saved = run.spent
            if rank == 0:
                run.save()
        if progress >= 1:
            break
        loss = run.update(progress)
        if rank == 0 and run.step % 50 == 0:
            speed = (run.step - first) * BATCH * WINDOW / (time.monotonic() - launched)
            print(
                f"step {run.step}  loss {loss:.3f}  {run.spent / 60:.1f} min  {progress:.1%}  {speed:.0f} tokens/s",
                flush=True,
            )
    if rank == 0:
        export(run.model, run.tokenizer, args.out)
    dist.destroy_process_group()


def main() -> None:
    """Prepare the data, then train in `--processes` processes."""
    args = parse()
    prepare(args)
    (args.work / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(train, args=(args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
