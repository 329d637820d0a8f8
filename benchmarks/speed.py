"""Time and memory of Soft and Sparse MoA against PEFT's LoRA and the base model, by family and dtype.

    python benchmarks/speed.py                                        # the whole table, half an hour on a quiet core
    python benchmarks/speed.py --families llama --dtypes float32 --work decode1 --rounds 40
    python benchmarks/speed.py --work compiled1                       # decoding under torch.compile, minutes a variant
    python benchmarks/speed.py --families smollm2 --rounds 4          # the whole real model in place of random blocks
    python benchmarks/speed.py --quantised nf4 int8                   # bases of bitsandbytes, where it is installed

Random weights in SmolLM2-135M's shape with six blocks, one thread. All variants share one set of base weights and are
measured in turns in one process; what counts are the ratios within rounds. Calls of torch's operations, which decoding
is made of, are counted and not timed. Results go to benchmarks/results/speed.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import interleave, keep_freed_memory, machine, operations, ratio, saved_bytes
from peers import naive_copies
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, StaticCache

import moa
from moa.models import load

RESULTS = Path(__file__).parent / "results" / "speed.json"
VOCABULARY = 8000
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = ("llama", "gemma3_text", "olmo2", "phi3")
WHOLE = "smollm2"
DTYPES = ("float32", "bfloat16")
WORK = ("train", "saved", "decode1", "decode8", "calls1", "calls8", "prefill", "compiled1")
LORA = "PEFT LoRA r=8"
QUANTISED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


def build_base(family: str, dtype: str) -> PreTrainedModel:
    if family == WHOLE:
        return load(WHOLE, dtype=getattr(torch, dtype))[0].eval().requires_grad_(False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE))
    return model.to(getattr(torch, dtype)).eval().requires_grad_(False)


def sharing(base: PreTrainedModel) -> PreTrainedModel:
    """The same model in new modules, over the same weights."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def awake(model: Any) -> Any:
    """Noise in weights that start at zero."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.data.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def lora_config(base: PreTrainedModel) -> LoraConfig:
    """On q, k, v, o and down, fused or not."""
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    wanted = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "down_proj"} & names
    return LoraConfig(r=8, lora_alpha=8, target_modules=sorted(wanted))


def build_variants(base: PreTrainedModel, make: Callable[[], PreTrainedModel], naive: bool) -> dict[str, Any]:
    models = {
        "base": base,
        LORA: awake(get_peft_model(make(), lora_config(base))),
        "Soft MoA": awake(get_peft_model(make(), moa.preset("soft-moa"))),
        "Sparse MoA": awake(get_peft_model(make(), moa.preset("sparse-moa"))),
    }
    if naive:
        models["MoLoRA x8, naive"] = awake(naive_copies(make(), copies=8, shared=False))
    return models


def train_step(model: Any) -> Callable[[], None]:
    ids = torch.randint(0, VOCABULARY, (4, 128))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    return step


def prefill_step(model: Any) -> Callable[[], None]:
    ids = torch.randint(0, VOCABULARY, (1, 512))

    @torch.no_grad()
    def step() -> None:
        model(input_ids=ids, logits_to_keep=1)

    return step


def decode_step(model: Any, rows: int, tokens: int = 8) -> Callable[[], None]:
    ids = torch.randint(0, VOCABULARY, (rows, 64))
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values

    @torch.no_grad()
    def step() -> None:
        for _ in range(tokens):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-tokens)

    return step


def compiled_step(model: Any, rows: int, tokens: int = 8) -> Callable[[], None]:
    """Decoding with a static cache and the whole model in one graph, which is an error where the graph breaks."""
    ids = torch.randint(0, VOCABULARY, (rows, 1))
    cache = StaticCache(config=model.config, max_cache_len=64 + tokens)
    compiled = torch.compile(model, fullgraph=True)

    @torch.no_grad()
    def step() -> None:
        cache.reset()
        for _ in range(tokens):
            compiled(input_ids=ids, past_key_values=cache, use_cache=True)

    return step


def steps_of(work: str, models: dict[str, Any]) -> dict[str, Callable[[], None]]:
    torch.manual_seed(2)
    steps: dict[str, Callable[[], None]] = {}
    for name, model in models.items():
        if work == "train":
            if name != "base":
                steps[name] = train_step(model.train())
        elif work == "prefill":
            steps[name] = prefill_step(model.eval())
        elif work.startswith("compiled"):
            steps[name] = compiled_step(model.eval(), int(work.removeprefix("compiled")))
        else:
            steps[name] = decode_step(model.eval(), int(work.removeprefix("decode")))
    return steps


def measure(work: str, models: dict[str, Any], rounds: int) -> Iterator[dict[str, Any]]:
    """One row per variant: the ratio to PEFT's LoRA for training, to the base for inference."""
    if work.startswith("calls"):
        steps = steps_of(work.replace("calls", "decode"), models)
        calls = {name: operations(step) for name, step in steps.items()}
        for name, number in calls.items():
            ratio_of_calls = {"median": round(number / calls["base"], 4)}
            yield {"variant": name, "reference": "base", "calls": number, "ratio": ratio_of_calls}
        return
    if work == "saved":
        ids = torch.zeros(4, 128, dtype=torch.long)
        kept = {
            name: saved_bytes(model.train(), lambda m=model: m(input_ids=ids, labels=ids, use_cache=False))
            for name, model in models.items()
            if name != "base"
        }
        for name, size in kept.items():
            yield {"variant": name, "reference": LORA, "bytes": size, "ratio": {"median": round(size / kept[LORA], 4)}}
        return
    reference = LORA if work == "train" else "base"
    steps = steps_of(work, models)
    seconds = interleave(steps, rounds if work in ("train", "prefill") else 2 * rounds, time.process_time)
    for name in steps:
        row = {"variant": name, "reference": reference, "ratio": ratio(seconds, name, reference)}
        yield row | {"ms": round(1e3 * statistics.median(seconds[name]), 3)}


def show(place: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    parts = []
    for row in rows:
        r = row["ratio"]
        spread = f" ({r['low']:.2f}-{r['high']:.2f})" if "low" in r else ""
        parts.append(f"{row['variant']} {r['median']:.3f}{spread}")
    where = f"{place['family']:12s} {place['dtype']:9s} {place['work']:8s} / {rows[0]['reference']}"
    print(f"{where}: {', '.join(parts)}", flush=True)


def quantised_models(kind: str) -> dict[str, Any]:
    """Variants over separately loaded bases, since a quantised weight cannot be shared by copying modules."""
    with tempfile.TemporaryDirectory() as folder:
        build_base("llama", "bfloat16").save_pretrained(folder)

        def load() -> PreTrainedModel:
            settings = BitsAndBytesConfig(**QUANTISED[kind])
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, quantization_config=settings, device_map="cpu"
            )

        return build_variants(load(), load, naive=False)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for kind in args.quantised:
        place = {"family": f"llama, {kind}", "dtype": "bfloat16", "work": "train"}
        rows = list(measure("train", quantised_models(kind), args.rounds))
        show(place, rows)
        found += [place | row for row in rows]
    for family in args.families if not args.quantised else ():
        for dtype in args.dtypes:
            base = build_base(family, dtype)
            naive = family == "llama" and dtype == "float32"
            models = build_variants(base, lambda b=base: sharing(b), naive)
            for work in args.work:
                place = {"family": family, "dtype": dtype, "work": work}
                rows = list(measure(work, models, args.rounds))
                show(place, rows)
                found += [place | row for row in rows]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=(*FAMILIES, WHOLE), default=FAMILIES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK)
    parser.add_argument("--quantised", nargs="+", choices=QUANTISED, default=(), help="measure these bases instead")
    parser.add_argument("--rounds", type=int, default=12, help="of training and prefill; decoding takes twice as many")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    rows = run(args)
    old = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    key = ("family", "dtype", "work", "variant")
    merged = {tuple(row.get(k) for k in key): row for row in [*old, *rows]}
    args.output.write_text(json.dumps({"machine": machine(1, "cpu"), "rows": list(merged.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
