"""Speed and memory of a span plan against the dense model, on random weights: decode, prefill, peak memory.

    python benchmarks/spans_speed.py [--context 8192 --batch 8 --threads 2 ...]

Ways to decode, interleaved in one process so that a busy machine hits them alike: `dense` with transformers'
`DynamicCache`, `near` (a plan whose spans are a block short of the text: the same code, rings and grouped attention,
with nearly all of the bytes, so the fair control) and `plan`. In the plan one half of a layer's KV heads keep 3/2 of
`--density`, the other half 1/2 of it, and an odd one the density. Ratios are taken within rounds; given are their
medians and quartiles. `ideal` is dense bytes over plan bytes. Peak memory is what a process of its own for each way had
on top of the model (from /proc on Linux; of the device elsewhere). Writes benchmarks/results/spans_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import ALLOCATOR, interleave, keep_freed_memory, machine, ratio
from transformers import LlamaConfig, LlamaForCausalLM

from moa.spans import SpanPlan, apply_spans, cache_bytes

RESULT = Path(__file__).parent / "results" / "spans_speed.json"
WAYS = ("dense", "near", "plan")
WARMUP = 2


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak(args.peak, args))
        return
    keep_freed_memory()
    peaks = {name: peak_of_process(name) for name in WAYS}
    models = {name: under(name, build(args), args) for name in WAYS}
    prefills, decodes = prefill(models, args), decode(models, args)
    result = {
        "settings": {name: value for name, value in vars(args).items() if name not in ("peak", "out")},
        "machine": machine(args.threads, "wall"),
        "prefill": summary(prefills),
        "decode": summary(decodes["seconds"]),
        "cache_bytes": decodes["bytes"],
        "ideal": round(decodes["bytes"]["dense"] / decodes["bytes"]["plan"], 4),
        "peak_bytes": peaks,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"context": 8192, "batch": 8, "layers": 8, "hidden": 512, "heads": 8, "kv-heads": 4}
    for name, default in {**shape, "steps": 20, "prefills": 3, "threads": torch.get_num_threads()}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--density", type=float, default=0.5, help="of the cache")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def build(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=2 * args.context,
        dtype=getattr(torch, args.dtype),
    )
    return LlamaForCausalLM(config).to(args.device, config.dtype).eval()


def under(name: str, model: LlamaForCausalLM, args: argparse.Namespace) -> LlamaForCausalLM:
    """The model, made to run one way for good; the plan's length is the longest that the text gets."""
    if name == "dense":
        return model
    half = args.kv_heads // 2
    slopes = [1.5 * args.density] * half + [args.density] * (args.kv_heads % 2) + [0.5 * args.density] * half
    plan = SpanPlan([[0.0] * args.kv_heads] * args.layers, [slopes] * args.layers)
    if name == "near":
        plan = SpanPlan.uniform(args.layers, args.kv_heads, alpha=-64.0, beta=1.0)
    apply_spans(model, plan, length=args.context + args.steps + WARMUP)
    return model


def filled(model: LlamaForCausalLM, args: argparse.Namespace) -> Any:
    """The cache of a batch after its prompt: one row is prefilled and repeated."""
    prompt = torch.randint(1, 512, (1, args.context), device=args.device)
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(args.batch)
    return cache


@torch.no_grad()
def decode(models: dict[str, LlamaForCausalLM], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step of the batch and bytes of its cache, by way."""
    token = torch.randint(1, 512, (args.batch, 1), device=args.device)
    caches = {name: filled(model, args) for name, model in models.items()}
    steps = {name: partial(model, token, past_key_values=caches[name]) for name, model in models.items()}
    seconds = interleave(steps, args.steps, time.perf_counter, warmup=WARMUP)
    return {"seconds": seconds, "bytes": {name: cache_bytes(cache) for name, cache in caches.items()}}


@torch.no_grad()
def prefill(models: dict[str, LlamaForCausalLM], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds for one row of the whole context, by way."""
    prompt = torch.randint(1, 512, (1, args.context), device=args.device)
    steps = {name: partial(model, prompt, use_cache=True, logits_to_keep=1) for name, model in models.items()}
    return interleave(steps, args.prefills, time.perf_counter, warmup=1)


@torch.no_grad()
def peak(name: str, args: argparse.Namespace) -> int:
    """Most bytes on top of the model's, of a prompt and a few steps of the batch."""
    model = under(name, build(args), args)
    before = most_bytes(args)
    cache = filled(model, args)
    token = torch.randint(1, 512, (args.batch, 1), device=args.device)
    for _ in range(3):
        model(token, past_key_values=cache)
    return most_bytes(args) - before


def most_bytes(args: argparse.Namespace) -> int:
    if args.device != "cpu":
        return torch.cuda.max_memory_allocated()
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return 1024 * int(found.group(1)) if found else 0


def peak_of_process(name: str) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", name]
    plain = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=plain).stdout.split()[-1])


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Median seconds, and how many times faster than dense."""
    return {
        name: {
            "seconds": round(statistics.median(taken), 6),
            "speedup": ratio(seconds, "dense", name),
            "over_near": ratio(seconds, "near", name),
        }
        for name, taken in seconds.items()
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"bytes: dense / plan = {result['ideal']:.2f}"]
    for part in ("prefill", "decode"):
        for name, found in result[part].items():
            speed = found["speedup"]
            lines.append(
                f"{part:8s}{name:6s}{1e3 * found['seconds']:9.1f} ms   {speed['median']:5.2f} x dense "
                f"[{speed['low']:.2f}, {speed['high']:.2f}]   {found['over_near']['median']:5.2f} x near"
            )
    for name in WAYS:
        cache, most = result["cache_bytes"][name] / 2**20, result["peak_bytes"][name] / 2**20
        lines.append(f"memory  {name:6s}{cache:9.1f} MiB cache   {most:8.1f} MiB peak")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
