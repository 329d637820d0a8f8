"""Time and memory of Soft and Sparse MoA against plain LoRA, naive mixtures and the base model.

    python benchmarks/speed.py                    # everything, about 15 minutes on two quiet cores
    python benchmarks/speed.py --work decode --hidden 512 --rounds 15
    python benchmarks/speed.py --scaling          # time and memory against blocks, experts, rank and tokens

All variants share one set of random base weights and are measured in turns in one process; what counts are the ratios
within rounds. Results go to benchmarks/results/speed.json, with a picture beside it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import interleave, keep_freed_memory, machine, ratio, saved_bytes
from moa.adapters.fused import fused_blocks
from peers import TARGETS, naive_copies, naive_moa
from peft import LilyConfig, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import moa

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 8000
WORK = ("train", "prefill", "decode1", "decode8")


def config_of(hidden: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def build_base(config: LlamaConfig, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device=device, dtype=dtype).eval().requires_grad_(False)


def sharing(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model in new modules, over the same weights."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def trained_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def lora_of_size(base: LlamaForCausalLM, parameters: int) -> Any:
    """Plain LoRA of the rank whose number of trained parameters comes closest."""
    per_rank = trained_parameters(get_peft_model(sharing(base), LoraConfig(r=1, target_modules=list(TARGETS))))
    return get_peft_model(sharing(base), LoraConfig(r=round(parameters / per_rank), target_modules=list(TARGETS)))


def awake(model: Any) -> Any:
    """Noise in weights that start at zero, and float32 adapters on the base's device."""
    device = next(model.parameters()).device
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(device=device, dtype=torch.float32)
            if not parameter.data.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def build_variants(base: LlamaForCausalLM) -> dict[str, Any]:
    soft = get_peft_model(sharing(base), moa.preset("soft-moa"))
    models = {
        "base": sharing(base),
        "PEFT LoRA r=8": get_peft_model(sharing(base), LoraConfig(r=8, lora_alpha=8, target_modules=list(TARGETS))),
        "PEFT LoRA, our size": lora_of_size(base, trained_parameters(soft)),
        "Soft MoA": soft,
        "Sparse MoA": get_peft_model(sharing(base), moa.preset("sparse-moa")),
        "Soft MoA, general path": soft,
        "Soft MoA, naive": naive_moa(sharing(base), sparse=False),
        "Sparse MoA, naive": naive_moa(sharing(base), sparse=True),
        "MoLoRA x8, naive": naive_copies(sharing(base), copies=8, shared=False),
        "HydraLoRA x3, naive": naive_copies(sharing(base), copies=3, shared=True),
        "PEFT Lily": get_peft_model(sharing(base), LilyConfig(r=8, target_modules=list(TARGETS))),
    }
    return {name: awake(model) if name != "base" else model for name, model in models.items()}


def on_its_path(name: str, step: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with fused_blocks(not name.endswith("general path")):
            return step()

    return run


def train_step(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    def step() -> None:
        if any(parameter.requires_grad for parameter in model.parameters()):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        else:  # a frozen base: what gradients through it cost
            embedded = model.get_input_embeddings()(ids).requires_grad_()
            loss = model(inputs_embeds=embedded, labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad()

    return step


def prefill_step(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    @torch.no_grad()
    def step() -> None:
        model(input_ids=ids, logits_to_keep=1)

    return step


def decode_step(model: Any, rows: int, device: str, tokens: int = 8) -> Callable[[], Any]:
    ids = torch.randint(0, VOCABULARY, (rows, 64), device=device)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values

    @torch.no_grad()
    def step() -> None:
        for _ in range(tokens):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-tokens)

    return step


def steps_of(work: str, models: dict[str, Any], device: str) -> dict[str, Callable[[], Any]]:
    """One callable per variant, each on its own path and in the mode that the work needs."""
    torch.manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (4, 256), device=device)
    steps = {}
    for name, model in models.items():
        model.train(work == "train")
        with fused_blocks(not name.endswith("general path")):
            if work == "train":
                step = train_step(model, ids)
            elif work == "prefill":
                step = prefill_step(model, ids[:2].reshape(1, -1))
            else:
                step = decode_step(model, int(work.removeprefix("decode")), device)
        steps[name] = on_its_path(name, step)
    return steps


def saved(models: dict[str, Any], device: str) -> dict[str, int]:
    ids = torch.zeros(4, 256, dtype=torch.long, device=device)
    found = {}
    for name, model in models.items():
        if name != "base":
            model.train()
            found[name] = saved_bytes(
                model, on_its_path(name, lambda m=model: m(input_ids=ids, labels=ids, use_cache=False))
            )
    return found


def measure(args: argparse.Namespace, hidden: int, dtype: str) -> list[dict[str, Any]]:
    layers = args.layers or (8 if hidden < 1024 else 4)
    base = build_base(config_of(hidden, layers), getattr(torch, dtype), args.device)
    models = build_variants(base)
    place = {"hidden": hidden, "layers": layers, "dtype": dtype}
    sizes = {name: trained_parameters(model) for name, model in models.items()}
    rows = []
    for work in args.work:
        reference = "PEFT LoRA r=8" if work == "train" else "base"
        clock = time.process_time if args.clock == "cpu" else time.perf_counter
        rounds = args.rounds if work == "train" else 2 * args.rounds
        seconds = interleave(steps_of(work, models, args.device), rounds, clock)
        for name in models:
            rows.append(
                place
                | {"work": work, "variant": name, "trained_parameters": sizes[name], "reference": reference}
                | {"ratio": ratio(seconds, name, reference), "ms": round(1e3 * statistics.median(seconds[name]), 3)}
                | {"to_soft": ratio(seconds, name, "Soft MoA")}
            )
        show(rows[-len(models) :])
    kept = saved(models, args.device)
    for name, size in kept.items():
        rows.append(
            place
            | {"work": "saved activations", "variant": name, "reference": "PEFT LoRA r=8", "bytes": size}
            | {"ratio": {"median": round(size / kept["PEFT LoRA r=8"], 4)}}
        )
    show(rows[-len(kept) :])
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    print(f"\n{first['work']}, hidden {first['hidden']}, {first['dtype']}: ratio to {first['reference']}")
    for row in rows:
        r = row["ratio"]
        spread = f"  ({r['low']:.3f} to {r['high']:.3f})" if "low" in r else ""
        print(f"  {row['variant']:24s} {r['median']:.3f}{spread}", flush=True)


def scaling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train step of Soft MoA and its saved bytes, one dimension at a time."""
    rows = []
    sweeps: dict[str, list[int]] = {
        "blocks": [2, 4, 8],
        "experts": [1, 3, 5, 7],
        "rank": [4, 16, 64],
        "tokens": [256, 512, 1024],
    }
    for dimension, values in sweeps.items():
        steps, extra = {}, {}
        for value in values:
            layers = value if dimension == "blocks" else 2
            base = build_base(config_of(512, layers), torch.float32, args.device)
            rank = value if dimension == "rank" else 8
            count = value if dimension == "experts" else 7
            targets = ["q", "k", "v", "o", "down"][: max(1, count - 2) if count > 2 else count]
            experts: list[Any] = [moa.LoraExpert(targets, r=rank, alpha=rank)]
            experts += [moa.ParallelExpert(16), moa.PromptExpert(10)][: max(0, count - 1) if count <= 3 else 2]
            model = awake(get_peft_model(base, moa.MoAConfig(experts=experts))).train()
            tokens = value if dimension == "tokens" else 512
            ids = torch.randint(0, VOCABULARY, (tokens // 256, 256), device=args.device)
            steps[str(value)] = train_step(model, ids)
            extra[str(value)] = saved_bytes(model, lambda m=model, i=ids: m(input_ids=i, labels=i, use_cache=False))
        clock = time.process_time if args.clock == "cpu" else time.perf_counter
        seconds = interleave(steps, args.rounds, clock)
        for value in values:
            rows.append(
                {"dimension": dimension, "value": value, "ms": 1e3 * statistics.median(seconds[str(value)])}
                | {"bytes": extra[str(value)]}
            )
            print(rows[-1], flush=True)
    return rows


def picture(results: dict[str, Any], path: Path) -> None:
    """Ratios as dots with their quartiles, one panel per piece of work."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    works = list(dict.fromkeys(row["work"] for row in results["rows"]))
    names = list(dict.fromkeys(row["variant"] for row in results["rows"]))
    places = list(dict.fromkeys((row["hidden"], row["dtype"]) for row in results["rows"]))
    figure, axes = plt.subplots(1, len(works), figsize=(3.4 * len(works), 0.32 * len(names) + 1.6), sharey=True)
    for axis, work in zip(axes if len(works) > 1 else [axes], works, strict=True):
        rows = [row for row in results["rows"] if row["work"] == work]
        for shift, (place, marker) in enumerate(zip(places, "osD^v", strict=False)):
            for row in rows:
                if (row["hidden"], row["dtype"]) != place:
                    continue
                y = names.index(row["variant"]) + 0.18 * (shift - (len(places) - 1) / 2)
                r = row["ratio"]
                axis.plot([r.get("low", r["median"]), r.get("high", r["median"])], [y, y], color="0.7", zorder=1)
                ours = row["variant"] in ("Soft MoA", "Sparse MoA")
                axis.plot(r["median"], y, marker, color="C0" if ours else "0.35", markersize=5)
        axis.axvline(1, color="0.5", linewidth=0.8)
        axis.set_title(f"{work}\n/ {rows[0]['reference']}", fontsize=9)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
    labels = ", ".join(f"{m} hidden {h} {d}" for (h, d), m in zip(places, "osD^v", strict=False))
    figure.suptitle(labels, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def scaling_picture(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    dimensions = list(dict.fromkeys(row["dimension"] for row in rows))
    figure, axes = plt.subplots(1, len(dimensions), figsize=(3 * len(dimensions), 2.8))
    for axis, dimension in zip(axes, dimensions, strict=True):
        part = [row for row in rows if row["dimension"] == dimension]
        x = [row["value"] for row in part]
        axis.plot(x, [row["ms"] for row in part], "o-", color="C0")
        axis.set_xlabel(dimension)
        axis.set_ylim(bottom=0)
        twin = axis.twinx()
        twin.plot(x, [row["bytes"] / 2**20 for row in part], "s--", color="C1")
        twin.set_ylim(bottom=0)
    axes[0].set_ylabel("train step, ms (line)")
    twin.set_ylabel("saved activations, MiB (dashed)")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--work", nargs="+", default=list(WORK), help="train, prefill, decodeN for N rows")
    parser.add_argument("--layers", type=int, help="blocks (8; 4 from hidden 1024 on)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu only with one thread")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--name", default="speed", help="name of the result files")
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu counts the seconds of all threads: use it with --threads 1")
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"machine": machine(args.threads, args.clock)}
    RESULTS.mkdir(exist_ok=True)
    if args.scaling:
        results["rows"] = scaling(args)
        scaling_picture(results["rows"], RESULTS / f"{args.name}_scaling.svg")
        target = RESULTS / f"{args.name}_scaling.json"
    else:
        results["rows"] = [row for d in args.dtype for h in args.hidden for row in measure(args, h, d)]
        picture(results, RESULTS / f"{args.name}.svg")
        target = RESULTS / f"{args.name}.json"
    target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{target}")


if __name__ == "__main__":
    keep_freed_memory()
    main()
