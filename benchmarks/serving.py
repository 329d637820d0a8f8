"""Output tokens per second of vLLM: a base alone, with mixtures, and with vLLM's own LoRA, for docs/serving.md.

    python benchmarks/serving.py run OUTPUT BASE SOFT SPARSE --rounds 3
    python benchmarks/serving.py table OUTPUT

Every measurement is a process of its own and the kinds take turns, so that a slow minute of the machine meets all. A
process answers prompts of 64 tokens with 64 tokens, one batch size after the other, after a warm-up. Two clocks are
read: the wall's, and the process's CPU time, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPT, NEW = 64, 64
BATCHES = (1, 8, 32)
KINDS = ("base", "native", "soft", "sparse", "lora", "two")
RANK_8 = {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]}


def settings_of(kind: str, given: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``."""
    from moa.serving.releases import ARCHITECTURE, WORKER

    if kind in ("base", "native"):
        return {"model_impl": "transformers" if kind == "base" else "auto"}
    if kind == "lora":
        return {"enable_lora": True, "max_lora_rank": 8, "model_impl": "auto"}
    folders = {kind: given.sparse if kind == "sparse" else given.soft}
    if kind == "two":
        folders = {"first": given.soft, "second": given.second or given.soft}
    overrides = {"architectures": [ARCHITECTURE], "moa_adapters": folders}
    several = {"enable_lora": True, "max_loras": 2, "worker_cls": WORKER} if kind == "two" else {}
    return {"hf_overrides": overrides, **several}


def requests_of(kind: str, batch: int, given: argparse.Namespace, scratch: Path) -> list[Any] | None:
    """Which adapter every row of a batch asks for."""
    if kind not in ("lora", "two"):
        return None
    from vllm.lora.request import LoRARequest

    if kind == "lora":
        return [LoRARequest("lora", 1, str(scratch / "lora"))] * batch
    pair = [LoRARequest("first", 1, given.soft), LoRARequest("second", 2, given.second or given.soft)]
    return [pair[row % 2] for row in range(batch)]


def measure(kind: str, given: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """In this process."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(
        given.base, dtype=given.dtype, max_model_len=256, max_num_seqs=max(BATCHES), enforce_eager=given.eager,
        enable_prefix_caching=False, skip_tokenizer_init=True, **settings_of(kind, given),
    )  # fmt: skip
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(0)
    found = []
    for batch in BATCHES:
        rows = torch.randint(3, vocabulary - 1, (batch, PROMPT), generator=generator).tolist()
        prompts = [{"prompt_token_ids": row} for row in rows]
        options = {"lora_request": requests_of(kind, batch, given, scratch), "use_tqdm": False}
        short, full = (SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in (4, NEW))
        llm.generate(prompts, short, **options)
        for _ in range(given.repeats):
            wall, cpu = time.perf_counter(), time.process_time()
            llm.generate(prompts, full, **options)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            tokens = batch * NEW
            found.append({"kind": kind, "batch": batch, "per_second": tokens / wall, "per_cpu_second": tokens / cpu})
    return found


def write_lora(base: str, folder: Path) -> None:
    """A LoRA adapter of rank 8 with noise in it: what it computes does not matter here, only how long it takes."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**RANK_8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 1e-3)
    model.save_pretrained(folder)


def run(given: argparse.Namespace) -> None:
    output = Path(given.output)
    output.mkdir(parents=True, exist_ok=True)
    if "lora" in given.kinds and not (output / "lora").exists():
        subprocess.run([sys.executable, __file__, "lora", str(output), given.base], check=True)
    for number in range(given.rounds):
        for kind in given.kinds:
            file = output / f"{kind}-{number}.json"
            if not file.exists():
                subprocess.run([sys.executable, __file__, "one", kind, str(file), *sys.argv[2:]], check=True)
                print(file, flush=True)


def table(output: Path) -> str:
    """Medians over all rounds of tokens per second and, behind the stroke, of the share of the base's."""
    rows = [row for file in sorted(output.glob("*-*.json")) for row in json.loads(file.read_text())]
    lines = [
        "| | clock | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |",
        "|---|---|" + "---|" * len(BATCHES),
    ]
    for kind in KINDS:
        for clock in ("per_second", "per_cpu_second"):
            cells = []
            for batch in BATCHES:
                ours, base = (
                    [row[clock] for row in rows if row["kind"] == of and row["batch"] == batch] for of in (kind, "base")
                )
                if ours and base:
                    middle = statistics.median(ours)
                    cells.append(f"{middle:.1f} / {middle / statistics.median(base):.2f}")
            if cells:
                lines.append(f"| {kind} | {'CPU' if 'cpu' in clock else 'wall'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb == "table":
        print(table(Path(sys.argv[2])))
        return
    if verb == "lora":
        write_lora(sys.argv[3], Path(sys.argv[2]) / "lora")
        return
    words = sys.argv[4:] if verb == "one" else sys.argv[2:]
    for name in ("output", "base", "soft", "sparse"):
        parser.add_argument(name)
    parser.add_argument("--second", help="a second mixture; default: the soft one again")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    given = parser.parse_args(words)
    if verb == "one":
        found = measure(sys.argv[2], given, Path(given.output))
        Path(sys.argv[3]).write_text(json.dumps(found, indent=1) + "\n")
    else:
        run(given)


if __name__ == "__main__":
    main()
